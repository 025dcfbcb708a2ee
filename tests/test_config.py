"""The configuration: every mistake at its place, no guess, and the example says what the code does."""

import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from sortd import config_yaml
from sortd.classify.types import Abstain, DecisionSettings, Mode
from sortd.config import (
    ANY,
    LIVE_KEYS,
    AbstainConfig,
    Config,
    DatasetConfig,
    Decoding,
    Log,
    MetricsConfig,
    ModeName,
    read_config,
    restart_needed,
    variable_name,
)
from sortd.config import KEYS as ALL_KEYS
from sortd.errors import ConfigError

EXAMPLE = Path(__file__).parents[1] / "config.example.yaml"
KEYS = {key for key in ALL_KEYS if ANY not in key}
PLACES = ("root", "state_dir", "cache_dir")  # without a default of their own: they follow the file and the environment


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A user with an empty home."""
    return {"HOME": str(tmp_path / "home")}


def read(folder: Path, text: str | bytes, environment: dict[str, str]) -> Config:
    """Write a file and load it."""
    file = folder / "config.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_config(file, environment)


def complaints(folder: Path, text: str | bytes, environment: dict[str, str]) -> list[str]:
    """The lines of the error, without the file's name."""
    with pytest.raises(ConfigError) as caught:
        read(folder, text, environment)
    return str(caught.value).replace(f"{folder / 'config.yaml'}:", "").splitlines()


class TestValues:
    """What was written is what is meant."""

    def test_nothing_said_gives_the_defaults(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """A file of comments is a configuration: data beside it, state and cache where XDG has them."""
        config = read(tmp_path, "# nothing yet\n", environment)
        home = tmp_path / "home"
        assert (config.root, config.mode, config.abstain) == (tmp_path / "Data", "mixed", AbstainConfig())
        assert config.state_dir == home / ".local/state/sortd"
        assert config.cache_dir == home / ".cache/sortd"

    @pytest.mark.parametrize("word", ["off", "Off", "OFF", "no", "No", "false", "False", "'off'"])
    def test_abstain_off_means_off(self, tmp_path: Path, environment: dict[str, str], word: str) -> None:
        """However YAML 1.1 would read it."""
        assert read(tmp_path, f"abstain: {word}", environment).abstain is None

    @pytest.mark.parametrize(
        "name",
        ["No", "on", "off", "yes", "1.0", "0x10", "012", "1e3", "12:30", "2024-01-01", "null", "~", "true", ".inf",
         "<<", "=", "ñandú", "a b", "-"],
    )  # fmt: skip
    def test_the_name_of_a_dataset_is_what_was_written(
        self, tmp_path: Path, environment: dict[str, str], name: str
    ) -> None:
        """Each of these is something else than a word to YAML 1.1."""
        quoted = f'"{name}"' if name in {"-", "=", "<<"} else name
        config = read(tmp_path, f"datasets:\n  {quoted}: {{mode: max}}\n", environment)
        assert list(config.datasets) == [name]
        assert config.dataset(name).mode == "max"

    def test_yes_and_no_in_any_of_their_words_are_taken_where_a_yes_or_no_is_wanted(
        self, tmp_path: Path, environment: dict[str, str]
    ) -> None:
        """People write on, yes and true."""
        config = read(tmp_path, "companions: no\nguard: off\nlearn_from_corrections: On\n", environment)
        assert (config.companions, config.guard, config.learn_from_corrections) == (False, False, True)

    def test_paths_are_relative_to_the_file_and_a_tilde_is_home(
        self, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whatever the working directory is."""
        monkeypatch.chdir("/")
        text = "root: ../pictures\nstate_dir: ~/s\ncache_dir: /var/c\nmetrics: {textfile: m.prom}\nmodel: ./clip\n"
        config = read(tmp_path, text, environment)
        assert config.root == tmp_path.parent / "pictures"
        assert config.state_dir == Path(environment["HOME"]) / "s"
        assert config.cache_dir == Path("/var/c")
        assert config.metrics.textfile == tmp_path / "m.prom"
        assert config.model == str(tmp_path / "clip")

    @pytest.mark.parametrize("name", ["m.txt", "m", "m.prom.txt", "/run/sortd/.prom"])
    def test_a_textfile_that_no_collector_reads_is_refused(
        self, tmp_path: Path, environment: dict[str, str], name: str
    ) -> None:
        """The textfile collector reads *.prom alone: anything else would be written for nobody."""
        (said,) = complaints(tmp_path, f"metrics: {{textfile: {name}}}", environment)
        assert "does not end in .prom" in said
        (said,) = complaints(tmp_path, "{}", environment | {"SORTD_METRICS__TEXTFILE": name})
        assert "does not end in .prom" in said

    def test_a_model_is_a_folder_where_a_folder_is_there(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """Else it is a name: org/name looks like a path and is none."""
        (tmp_path / "models" / "mine").mkdir(parents=True)
        assert read(tmp_path, "model: models/mine", environment).model == str(tmp_path / "models/mine")
        assert read(tmp_path, "model: openai/clip-vit-base-patch32", environment).model.startswith("openai/")
        assert read(tmp_path, "model: auto", environment).model == "auto"

    def test_systemd_says_where_state_and_cache_are(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """A unit with several state directories names ours first; the file wins over both."""
        environment |= {"STATE_DIRECTORY": "/var/lib/sortd:/var/lib/more", "CACHE_DIRECTORY": "/var/cache/sortd"}
        config = read(tmp_path, "{}", environment)
        assert (config.state_dir, config.cache_dir) == (Path("/var/lib/sortd"), Path("/var/cache/sortd"))
        assert read(tmp_path, "state_dir: here", environment).state_dir == tmp_path / "here"

    def test_without_a_home_the_folders_must_be_given(self, tmp_path: Path) -> None:
        """A folder called ~ in the working directory would be a strange place for the journal."""
        assert complaints(tmp_path, "{}", {}) == [
            "1:1: state_dir: has no default, since neither HOME nor a folder of systemd is set; add it",
            "1:1: cache_dir: has no default, since neither HOME nor a folder of systemd is set; add it",
        ]
        config = read(tmp_path, "{state_dir: s, cache_dir: c}", {"XDG_STATE_HOME": "relative"})
        assert config.state_dir == tmp_path / "s"

    def test_a_configuration_is_frozen(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """It is read once and passed down as a value."""
        config = read(tmp_path, "{}", environment)
        with pytest.raises(ValidationError, match="frozen"):
            config.mode = "max"

    def test_prompts_are_the_users_own(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """Templates in another language take the place of ours."""
        config = read(tmp_path, "prompts:\n  - una foto de {}\n", environment)
        assert config.prompts == ("una foto de {}",)

    def test_aliases_serve_for_repeated_parts(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """An anchor written once may stand for several datasets."""
        text = "datasets:\n  A: &strict {abstain: {precision: 0.99}}\n  B: *strict\n"
        config = read(tmp_path, text, environment)
        assert config.dataset("B").abstain == AbstainConfig(precision=0.99)


class TestDatasets:
    """What holds for one dataset: its own words over those for all."""

    def test_a_dataset_that_is_not_named_has_what_all_have(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """Most datasets are not named."""
        config = read(tmp_path, "mode: max\nsettle_seconds: 3\n", environment)
        assert config.dataset("Ropa") == DatasetConfig(mode="max", settle_seconds=3)

    def test_its_own_words_win_key_by_key(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """Within a group too: a precision of its own leaves the strangers of all."""
        text = """
mode: best
abstain: {precision: 0.9, strangers: 0.05}
datasets:
  A: {abstain: {precision: 0.99}}
  B: {mode: avg, abstain: off}
  C:
"""
        config = read(tmp_path, text, environment)
        assert config.dataset("A").abstain == AbstainConfig(precision=0.99, strangers=0.05)
        assert config.dataset("A").mode == "best"
        assert (config.dataset("B").mode, config.dataset("B").abstain) == ("avg", None)
        assert config.dataset("C") == config.dataset("unnamed")

    def test_a_dataset_can_abstain_where_the_others_do_not(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """Its missing keys are the defaults then."""
        config = read(tmp_path, "abstain: off\ndatasets: {A: {abstain: {strangers: 0.1}}}", environment)
        assert config.dataset("A").abstain == AbstainConfig(precision=0.95, strangers=0.1)

    def test_what_holds_for_the_program_cannot_differ(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """One model serves all datasets."""
        lines = complaints(tmp_path, "datasets: {A: {model: packaged}}", environment)
        assert lines == ["1:16: datasets.A.model: unknown key; it cannot differ between datasets"]


class TestMistakes:
    """All at once, each as file:line:column: key: message."""

    def test_every_mistake_is_told_in_one_go_in_the_order_of_the_file(
        self, tmp_path: Path, environment: dict[str, str]
    ) -> None:
        """Nobody mends a file one error at a time."""
        text = """\
rot: Data
mode: bets
abstain: {precision: 2, strangers: x}
settle_seconds: fast
datasets:
  Tornillos:
    setle_seconds: 2
  Ropa: 3
prompts: [a photo]
log: [1]
backlog_limit: 1
learn_from_corrections: maybe
device: gpu
companions:
polling: [always]
mode: max
"""
        assert complaints(tmp_path, text, environment) == [
            "1:1: rot: unknown key; did you mean root?",
            "2:1: mode: 'bets' is none of avg, max, mean, text, best, mixed; did you mean best?",
            "3:11: abstain.precision: '2' should be less than 1",
            "3:25: abstain.strangers: 'x' is neither auto nor a share between 0 and 1",
            "4:1: settle_seconds: 'fast' is not a number",
            "7:5: datasets.Tornillos.setle_seconds: unknown key; did you mean settle_seconds?",
            "8:3: datasets.Ropa: must be a group of keys, indented below it",
            "9:11: prompts.0: 'a photo' has no {} for the name of the class",
            "10:1: log: must be a group of keys, indented below it",
            "11:1: backlog_limit: '1' should be greater than or equal to 100",
            "12:1: learn_from_corrections: 'maybe' is neither yes nor no",
            "13:1: device: 'gpu' is none of auto, cpu, cuda, cuda:0, mps",
            "14:1: companions: has no value; give it one or remove the line",
            "15:1: polling: must be one value, not a list or a group of keys",
            "16:1: mode: is given twice; keep one",
        ]

    @pytest.mark.parametrize(
        ("text", "complaint"),
        [
            ("abstain:\n", "1:1: abstain: has no value; give it one or remove the line"),
            ("abstain: 0.9\n", "1:1: abstain: must be a group of keys, indented below it, or `off`"),
            ("abstain: {strangers: 1}", "1:11: abstain.strangers: '1' is neither auto nor a share between 0 and 1"),
            ("abstain: {strangers: nan}", "1:11: abstain.strangers: 'nan' is neither auto nor a share between 0 and 1"),
            ("settle_seconds: .nan", "1:1: settle_seconds: '.nan' is not a number"),
            ("settle_seconds: nan", "1:1: settle_seconds: 'nan' should be a finite number"),
            ("settle_seconds: 0", "1:1: settle_seconds: '0' should be greater than or equal to 0.1"),
            ("batch_size: 1.5", "1:1: batch_size: '1.5' is not a whole number"),
            ("prompts: []", "1:1: prompts: the list is empty; it needs at least one sentence"),
            ("prompts: a {}", "1:1: prompts: 'a {}' is not a list; write one `- ...` line for each"),
            ("mode: [max]", "1:1: mode: must be one value, not a list or a group of keys"),
            ("root: {a: b}", "1:1: root: must be one value, not a list or a group of keys"),
            ("- mode: max", "1:1: must be lines of `key: value`"),
            ("just text", "1:1: must be lines of `key: value`"),
            ("? [a, b]\n: c", "1:3: a key must be a word, not a list or a mapping"),
            ("model: ''", "1:1: model: must not be empty"),
            ("root: ''", "1:1: root: must not be empty; name a folder, or remove the line"),
            ("datasets: {A: {mode: max}, A: {mode: avg}}", "1:28: datasets.A: is given twice; keep one"),
            ("root: Data\n\tmode: max", "2:1: a tab begins this line or value; YAML indents with spaces only"),
            ("mode: max\n  root: Data", "2:7: is not YAML: mapping values are not allowed here"),
            ("a: [1, 2", "1:9: is not YAML: expected ',' or ']', but got '<stream end>' while parsing a flow sequence"),
            ("mode: max\n---\nmode: avg", "2:1: is not YAML: but found another document expected a single document in the stream"),  # noqa: E501
            ("mode: !!python/name:os.system x", "1:7: mode: the tag !!python/name:os.system is not allowed here"),
            ("mode: !custom max", "1:7: mode: the tag !custom is not allowed here"),
            ("a: *nowhere", "1:4: is not YAML: found undefined alias 'nowhere'"),
            ("", "1:1: is empty, as after a failed write; put `root:` in it or remove it"),
            ("  \n\n", "1:1: is empty, as after a failed write; put `root:` in it or remove it"),
        ],
    )  # fmt: skip
    def test_each_says_what_and_where(
        self, tmp_path: Path, environment: dict[str, str], text: str, complaint: str
    ) -> None:
        """The first line of the error names the place and the thing."""
        assert complaints(tmp_path, text, environment)[0] == complaint

    def test_a_file_that_was_named_must_be_there(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """Defaults in its place would sort the wrong folder."""
        with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
            read_config(tmp_path / "none.yaml", environment)
        with pytest.raises(ConfigError, match="Is a directory"):
            read_config(tmp_path, environment)


HOSTILE: dict[str, bytes] = {
    "laughs": b"a: &a [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(f"{b}: &{b} [{','.join(['*' + a] * 9)}]\n".encode() for a, b in pairwise("abcdefghi")),
    "itself": b"datasets: &a {x: *a}",
    "huge": b"# " + b"x" * 10_000_000,
    "binary": bytes(range(256)) * 100,
    "elf": b"\x7fELF\x02\x01\x01" + bytes(1000),
    "jpeg": b"\xff\xd8\xff\xe0\x00\x10JFIF" + bytes(500),
    "latin-1": "root: Imágenes\n".encode("latin-1"),
    "utf-16": "root: Data\n".encode("utf-16"),
    "nul": b"root: Da\x00ta\n",
    "deep list": b"- " * 30_000,
    "deep flow": b"[" * 60_000,
    "deep flow, closed": b"[" * 5_000 + b"]" * 5_000,
    "deep map": b"{a: " * 15_000,
    "anchors": b"&a " * 20_000,
    "tabs": b"\t" * 60_000,
    "quotes": b'"' + b"\\x41" * 15_000,
    "long key": b"a" * 60_000 + b": 1",
    "python": b"mode: !!python/object/apply:os.system ['touch /tmp/owned']",
    "merge": b"<<: {mode: max}",
}  # fmt: skip


class TestHostileFiles:
    """No file takes long, runs code or ends the program."""

    @pytest.mark.parametrize("name", sorted(HOSTILE))
    def test_it_is_refused_in_a_moment(self, tmp_path: Path, environment: dict[str, str], name: str) -> None:
        """With one of our errors, which names the file."""
        with pytest.raises(ConfigError, match=r"config\.yaml:\d+:\d+: "):
            read(tmp_path, HOSTILE[name], environment)

    @given(st.binary(max_size=300))
    def test_random_bytes_are_read_or_refused(self, content: bytes) -> None:
        """Parsing ends with a tree, whose mistakes say what was wrong with its form."""
        tree = config_yaml.parse(content)
        assert all(mistake.message and mistake.line >= 1 and mistake.column >= 1 for mistake in tree.mistakes)

    @given(st.text(alphabet="abcmode: {}[]&*!|>'\"\n\t-?,#%@`~", max_size=60))
    def test_random_yaml_is_read_or_refused(self, text: str) -> None:
        """Whatever the scanner meets, only values and mistakes come out."""
        tree = config_yaml.parse(text.encode())
        assert all(mistake.line >= 1 and mistake.column >= 1 for mistake in tree.mistakes)


class TestVariables:
    """SORTD_... wins over the file."""

    def test_each_kind_of_key_can_be_set(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """Plain, nested, of one dataset whose name keeps its case, and a list written as in YAML."""
        environment |= {
            "SORTD_MODEL": "packaged",
            "SORTD_SETTLE_SECONDS": "2.5",
            "SORTD_ABSTAIN__PRECISION": "0.9",
            "SORTD_DATASETS__Tornillos__MODE": "max",
            "SORTD_DATASETS__Tornillos__ABSTAIN__STRANGERS": "0.2",
            "SORTD_PROMPTS": '["una foto de {}"]',
            "SORTD_METRICS__HTTP_PORT": "9100",
            "SORTD_COMPANIONS": "",
        }
        config = read(tmp_path, "model: auto\nsettle_seconds: 9\nabstain: {strangers: 0.1}\n", environment)
        assert (config.model, config.settle_seconds, config.prompts) == ("packaged", 2.5, ("una foto de {}",))
        assert config.abstain == AbstainConfig(precision=0.9, strangers=0.1)
        own = config.dataset("Tornillos")
        assert (own.mode, own.abstain) == ("max", AbstainConfig(precision=0.9, strangers=0.2))
        assert config.metrics.http_port == 9100
        assert config.companions

    def test_off_can_be_said(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """A whole group may be replaced by a word, and a word by a group."""
        assert read(tmp_path, "abstain: {precision: 0.9}", environment | {"SORTD_ABSTAIN": "off"}).abstain is None
        config = read(tmp_path, "abstain: off", environment | {"SORTD_ABSTAIN__PRECISION": "0.8"})
        assert config.abstain == AbstainConfig(precision=0.8)

    def test_their_paths_are_relative_to_where_one_stands(
        self, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The shell completes them there."""
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        assert read(tmp_path, "root: a", environment | {"SORTD_ROOT": "b"}).root == elsewhere / "b"

    def test_mistakes_name_the_variable(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """A variable that nobody reads is a mistake as well: it was meant to do something."""
        environment |= {
            "SORTD_SETTLE_SECOND": "3",
            "SORTD_MODE": "bets",
            "SORTD_ABSTAIN__PRECISION": "7",
            "SORTD_DATASETS__A__MODEL": "x",
            "SORTD_PROMPTS": "[a",
        }
        lines = complaints(tmp_path, "mode: max\nbatch_size: x", environment)
        assert lines[0] == "2:1: batch_size: 'x' is not a whole number"
        assert set(lines[1:]) == {
            "SORTD_SETTLE_SECOND: unknown variable; did you mean SORTD_SETTLE_SECONDS?",
            "SORTD_MODE: 'bets' is none of avg, max, mean, text, best, mixed; did you mean best?",
            "SORTD_ABSTAIN__PRECISION: '7' should be less than 1",
            "SORTD_DATASETS__A__MODEL: unknown variable",
            "SORTD_PROMPTS: is not YAML: expected ',' or ']', but got '<stream end>' while parsing a flow sequence",
        }

    def test_every_key_has_a_variable_of_its_own(self) -> None:
        """Two keys under one variable would set each other."""
        assert len({variable_name(key) for key in ALL_KEYS}) == len(ALL_KEYS)
        assert ("abstain", "precision") in ALL_KEYS
        assert ("datasets", "*", "abstain", "strangers") in ALL_KEYS


class TestSearch:
    """Where no file is named."""

    def test_the_nearest_file_serves(
        self, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The working directory's, then the user's, then built-in defaults with ./Data."""
        monkeypatch.chdir(tmp_path)
        users = Path(environment["HOME"]) / ".config/sortd/config.yaml"
        assert read_config(None, environment).root == tmp_path / "Data"
        users.parent.mkdir(parents=True)
        users.write_text("root: mine")
        assert read_config(None, environment).root == users.parent / "mine"
        (tmp_path / "config.yaml").write_text("root: near")
        assert read_config(None, environment).root == tmp_path / "near"


class TestReload:
    """What a running sortd takes over and what waits."""

    @pytest.mark.parametrize(
        ("text", "waits"),
        [
            ("mode: max\nabstain: off\nsettle_seconds: 3\nlog: {level: debug}\ndatasets: {A: {mode: avg}}", []),
            ("model: packaged\nroot: elsewhere\n", ["model", "root"]),
            ("log: {format: json}\nmetrics: {http_port: 9000}\n", ["log.format", "metrics.http_port"]),
            ("decoding: {workers: 2}\n", ["decoding.workers"]),
        ],
    )
    def test_keys_that_wait_are_named(
        self, tmp_path: Path, environment: dict[str, str], text: str, waits: list[str]
    ) -> None:
        """The operator learns that a restart is due, and for which keys."""
        before = read(tmp_path, "{}", environment)
        assert restart_needed(before, before) == []
        assert restart_needed(before, read(tmp_path, text, environment)) == waits

    def test_the_example_marks_the_keys_that_wait(self) -> None:
        """[restart] stands with exactly the keys that restart_needed knows, or with the group that they are in."""
        reasons = reasons_in_the_example()
        leaves = KEYS - {key[:1] for key in KEYS if len(key) > 1}
        marked = {key for key in leaves if "[restart]" in reasons[key] + reasons[key[:1]]}
        waiting = {key for key in leaves if not {".".join(key), key[0]} & LIVE_KEYS}
        assert marked == waiting


def reasons_in_the_example() -> dict[tuple[str, ...], str]:
    """The comment above each key; a key right below another shares its."""
    reasons: dict[tuple[str, ...], str] = {}
    comment, group, is_open = "", "", False
    for line in EXAMPLE.read_text("utf-8").splitlines():
        if match := re.match(r"( *)(\w+):", line):
            group = group if match[1] else match[2]
            reasons[(group, match[2]) if match[1] else (group,)] = comment
            is_open = False
        elif line.strip().startswith("#"):
            comment = f"{comment} {line.strip()}" if is_open else line.strip()
            is_open = True
        elif not line.strip():
            comment, is_open = "", False
    return reasons


class TestExample:
    """config.example.yaml against the code."""

    def test_it_holds_every_key_with_its_default_and_no_other(self, environment: dict[str, str]) -> None:
        """Loaded, it is the configuration of somebody who said nothing."""
        config = read_config(EXAMPLE, environment)
        nothing = read_config(None, environment | {"SORTD_ROOT": str(config.root)})
        assert config == nothing
        assert config.root == EXAMPLE.parent / "Data"

    def test_every_key_stands_in_it_with_its_line_of_why(self) -> None:
        """A key of the model that is not shown would stay unknown."""
        reasons = reasons_in_the_example()
        assert reasons.keys() == KEYS
        assert [key for key, reason in reasons.items() if not reason] == []


def test_modes_and_defaults_are_those_of_the_decisions() -> None:
    """The configuration names them itself, since importing numpy to print --help would be slow."""
    assert set(get_args(ModeName)) == {mode.value for mode in Mode}
    assert DatasetConfig().mode == DecisionSettings().mode
    assert DatasetConfig().abstain is not None
    assert AbstainConfig().model_dump() == {
        "precision": Abstain().precision,
        "strangers": Abstain().strangers,
    }


@pytest.mark.parametrize("model", [AbstainConfig, Config, DatasetConfig, Decoding, Log, MetricsConfig])
def test_defaults_are_valid(model: type[BaseModel]) -> None:
    """Defaults are taken unseen by pydantic; each one passes its own check."""
    places: dict[str, Any] = dict.fromkeys(PLACES, "/x") if model is Config else {}
    defaults = model(**places)
    assert model.model_validate(defaults.model_dump()) == defaults


def test_importing_it_is_quick_and_light() -> None:
    """`sortd --help` and `check` pay for it: no torch, no numpy."""
    program = "import sys, sortd.config; print('numpy' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
