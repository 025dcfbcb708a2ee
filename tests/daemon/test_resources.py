"""Resources: what datasets of several roots share, and what they must not."""

from pathlib import Path

from sortd.classify.types import DecisionSettings
from sortd.config import Config
from sortd.daemon.resources import Resources
from sortd.daemon.worker import PrototypeStore
from sortd.events import Mode
from sortd.store.cache import Cache
from tests.daemon_process import make_dataset
from tests.prototype_maker import make_prototypes


def store(cache: Cache, root: Path) -> PrototypeStore:
    """Return where the prototypes of the datasets below a root are kept."""
    return Resources(Config(root=root, state_dir=root / "state", cache_dir=root / "cache"))._store(cache)


def test_two_roots_that_share_a_cache_have_prototypes_of_their_own(tmp_path: Path) -> None:
    """Datasets of one name in two places are two datasets: neither decides with what the other one has learnt."""
    here, there = tmp_path / "here", tmp_path / "there"
    prototypes = make_prototypes(make_dataset(here), DecisionSettings(Mode.MAX, None))
    make_dataset(there)
    with Cache(tmp_path / "cache" / "embeddings.sqlite") as cache:
        store(cache, here).write("Colours", prototypes)
        assert store(cache, there).read("Colours") is None
        found = store(cache, here).read("Colours")
    assert found is not None
    assert found.fingerprint == prototypes.fingerprint
