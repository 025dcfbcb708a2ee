"""Resources: what datasets of several roots share, and what they must not."""

from pathlib import Path

from sortd.cache import Cache
from sortd.config import Config
from sortd.daemon.resources import Site
from sortd.prototypes import DecisionSettings, Mode
from tests.daemon_process import make_dataset
from tests.prototype_maker import make_prototypes


def test_two_roots_that_share_a_cache_have_prototypes_of_their_own(tmp_path: Path) -> None:
    """Datasets of one name in two places are two datasets: neither decides with what the other one has learnt."""
    here, there = tmp_path / "here", tmp_path / "there"
    prototypes = make_prototypes(make_dataset(here), DecisionSettings(Mode.MAX, None))
    make_dataset(there)
    with Cache(tmp_path / "cache" / "embeddings.sqlite") as cache:
        Site(Config(root=here))._store(cache).write("Colours", prototypes)
        assert Site(Config(root=there))._store(cache).read("Colours") is None
        found = Site(Config(root=here))._store(cache).read("Colours")
    assert found is not None
    assert found.fingerprint == prototypes.fingerprint
