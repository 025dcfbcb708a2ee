"""The configuration: every mistake at its place, no guess, and the example says what the code does."""

import os
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
from sortd.classify.types import AbstainSettings, DecisionSettings
from sortd.config import KEYS as ALL_KEYS
from sortd.config import (
    LIVE_KEYS,
    AbstainConfig,
    Config,
    DatasetConfig,
    Decoding,
    Log,
    ModeName,
    read_config,
    restart_needed,
)
from sortd.config_reporting import HookConfig, MetricsConfig, NotifyConfig, TargetConfig, targets_of
from sortd.config_variables import ANY, variable_name
from sortd.errors import ConfigError
from sortd.events import Mode

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

    def test_read_config_of_comments_gives_the_defaults(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """The root is ./Data next to the file; state and cache are where XDG defines them."""
        config = read(tmp_path, "# nothing yet\n", environment)
        home = tmp_path / "home"
        assert (config.root, config.mode, config.abstain) == (tmp_path / "Data", "mixed", AbstainConfig())
        assert config.state_dir == home / ".local/state/sortd"
        assert config.cache_dir == home / ".cache/sortd"

    @pytest.mark.parametrize("word", ["off", "Off", "OFF", "no", "No", "false", "False", "'off'"])
    def test_abstain_off_is_none(self, tmp_path: Path, environment: dict[str, str], word: str) -> None:
        """YAML 1.1 would read some of these words as False."""
        assert read(tmp_path, f"abstain: {word}", environment).abstain is None

    @pytest.mark.parametrize(
        "name",
        ["No", "on", "off", "yes", "1.0", "0x10", "012", "1e3", "12:30", "2024-01-01", "null", "~", "true", ".inf",
         "<<", "=", "ñandú", "a b", "-"],
    )  # fmt: skip
    def test_dataset_name_is_kept_as_text(self, tmp_path: Path, environment: dict[str, str], name: str) -> None:
        """YAML 1.1 would convert each of these names."""
        quoted = f'"{name}"' if name in {"-", "=", "<<"} else name
        config = read(tmp_path, f"datasets:\n  {quoted}: {{mode: max}}\n", environment)
        assert list(config.datasets) == [name]
        assert config.dataset(name).mode == "max"

    def test_booleans_accept_yes_no_on_and_off(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """A boolean key accepts all usual words."""
        config = read(tmp_path, "companions: no\nguard: off\nlearn_from_corrections: On\n", environment)
        assert (config.companions, config.guard, config.learn_from_corrections) == (False, False, True)

    def test_paths_in_a_file_are_relative_to_it(
        self, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The working directory does not matter, and a tilde is HOME."""
        monkeypatch.chdir("/")
        text = "root: ../pictures\nstate_dir: ~/s\ncache_dir: /var/c\nmetrics: {textfile: m.prom}\nmodel: ./clip\n"
        config = read(tmp_path, text, environment)
        assert config.root == tmp_path.parent / "pictures"
        assert config.state_dir == Path(environment["HOME"]) / "s"
        assert config.cache_dir == Path("/var/c")
        assert config.metrics.textfile == tmp_path / "m.prom"
        assert config.model == str(tmp_path / "clip")

    @pytest.mark.parametrize("name", ["m.txt", "m", "m.prom.txt", "/run/sortd/.prom"])
    def test_textfile_without_the_ending_prom_is_refused(
        self, tmp_path: Path, environment: dict[str, str], name: str
    ) -> None:
        """The textfile collector reads *.prom only."""
        (said,) = complaints(tmp_path, f"metrics: {{textfile: {name}}}", environment)
        assert "does not end in .prom" in said
        (said,) = complaints(tmp_path, "{}", environment | {"SORTD_METRICS__TEXTFILE": name})
        assert "does not end in .prom" in said

    @pytest.mark.parametrize(
        ("written", "address"),
        [
            ("9464", ("127.0.0.1", 9464)),
            ("0.0.0.0:80", ("0.0.0.0", 80)),  # noqa: S104 -- it is only read
            ("'[::1]:9464'", ("::1", 9464)),
            ("unix:run/s", "run/s"),
        ],
    )
    def test_metrics_address_has_several_forms(
        self, tmp_path: Path, environment: dict[str, str], written: str, address: tuple[str, int] | str
    ) -> None:
        """A port alone is one of loopback, as ``http_port`` is; a path is relative to the file."""
        found = read(tmp_path, f"metrics: {{http: {written}}}", environment).metrics.address
        assert found == (tmp_path / address if isinstance(address, str) else address)
        assert read(tmp_path, "metrics: {http_port: 9464}", environment).metrics.address == ("127.0.0.1", 9464)
        assert read(tmp_path, "mode: max", environment).metrics.address is None

    def test_addresses_of_notifications_are_secrets(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """Nothing that prints the configuration shows one; files and programs are relative to the configuration."""
        text = (
            "notify: {urls: [json://sesame@host, {url_file: a, events: [daily_summary]}]}\n"
            "hooks: [{command: [./b, c]}, {command: [d]}]"
        )
        config = read(tmp_path, text, environment)
        assert "sesame" not in f"{config!r} {config} {config.model_dump()} {config.model_dump_json()}"
        plain, filed = config.notify.urls
        assert plain.url is not None
        assert plain.url.get_secret_value() == "json://sesame@host"
        assert filed == TargetConfig(url_file=tmp_path / "a", events=("daily_summary",))
        assert config.hooks == (HookConfig(command=(f"{tmp_path}/b", "c")), HookConfig(command=("d",)))
        names = ["notify.urls.0", "notify.urls.1", f"hooks.0 ({tmp_path}/b)", "hooks.1 (d)"]
        assert list(targets_of(config.notify, config.hooks)) == names

    @pytest.mark.parametrize(
        "text",
        [
            "notify: {urls: [{url_file: json://sesame@host}]}",
            "notify: {urls: [{url: json://host, events: [json://sesame@host]}]}",
            "hooks: [{command: [a], events: [json://sesame@host]}]",
            "notify: {urls: json://sesame@host}",
            "notify: {urls: [json://sesame@host: ]}",
            "notify: {urls: [{url: [json://sesame@host]}]}",
            "notify: {url: json://sesame@host}",
            "notify: json://sesame@host",
        ],
    )
    def test_address_in_a_wrong_place_is_not_in_the_complaint(
        self, tmp_path: Path, environment: dict[str, str], text: str
    ) -> None:
        """The log has complaints."""
        (complaint,) = complaints(tmp_path, text, environment)
        assert "sesame" not in complaint

    def test_model_is_a_path_if_such_a_folder_exists(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """Otherwise it is a name, like org/name."""
        (tmp_path / "models" / "mine").mkdir(parents=True)
        assert read(tmp_path, "model: models/mine", environment).model == str(tmp_path / "models/mine")
        assert read(tmp_path, "model: openai/clip-vit-base-patch32", environment).model.startswith("openai/")
        assert read(tmp_path, "model: auto", environment).model == "auto"

    @pytest.mark.parametrize("written", ["socket:run/encoder.sock", "socket:./run/encoder.sock"])
    def test_encoder_socket_is_relative_to_the_file(
        self, tmp_path: Path, environment: dict[str, str], written: str
    ) -> None:
        """As other paths are; the other backends have none, and a path is no longer than that of a socket."""
        config = read(tmp_path, f"backend: {written}", environment)
        assert config.encoder_socket == tmp_path / "run" / "encoder.sock"
        assert config.backend == f"socket:{tmp_path}/run/encoder.sock"
        assert read(tmp_path, "backend: onnx", environment).encoder_socket is None
        assert "no path of at most 107 bytes" in complaints(tmp_path, f"backend: socket:{'x' * 107}", environment)[0]

    def test_state_and_cache_default_to_the_folders_of_systemd(
        self, tmp_path: Path, environment: dict[str, str]
    ) -> None:
        """The first of several state directories is used; the file has precedence."""
        environment |= {"STATE_DIRECTORY": "/var/lib/sortd:/var/lib/more", "CACHE_DIRECTORY": "/var/cache/sortd"}
        config = read(tmp_path, "{}", environment)
        assert (config.state_dir, config.cache_dir) == (Path("/var/lib/sortd"), Path("/var/cache/sortd"))
        assert read(tmp_path, "state_dir: here", environment).state_dir == tmp_path / "here"

    def test_state_and_cache_without_a_home_are_required(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without HOME there is no default for state and cache; without a file, the message names no place in one."""
        monkeypatch.chdir(tmp_path)
        if not os.path.exists("/etc/sortd/config.yaml"):
            with pytest.raises(ConfigError, match=r"\Astate_dir: has no default"):
                read_config(None, {})
        assert complaints(tmp_path, "{}", {}) == [
            "1:1: state_dir: has no default, since neither HOME nor a folder of systemd is set; add it",
            "1:1: cache_dir: has no default, since neither HOME nor a folder of systemd is set; add it",
        ]
        config = read(tmp_path, "{state_dir: s, cache_dir: c}", {"XDG_STATE_HOME": "relative"})
        assert config.state_dir == tmp_path / "s"

    def test_config_is_frozen(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """A configuration cannot be changed after it is read."""
        config = read(tmp_path, "{}", environment)
        with pytest.raises(ValidationError, match="frozen"):
            config.mode = "max"

    def test_prompts_replace_the_default_templates(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """Templates in another language can be used."""
        config = read(tmp_path, "prompts:\n  - una foto de {}\n", environment)
        assert config.prompts == ("una foto de {}",)

    def test_yaml_aliases_are_resolved(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """An anchor can be used for several datasets."""
        text = "datasets:\n  A: &strict {abstain: {precision: 0.99}}\n  B: *strict\n"
        config = read(tmp_path, text, environment)
        assert config.dataset("B").abstain == AbstainConfig(precision=0.99)


class TestDatasets:
    """What holds for one dataset: its own words over those for all."""

    def test_dataset_without_keys_has_the_general_values(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """Most datasets have no keys of their own."""
        config = read(tmp_path, "mode: max\nsettle_seconds: 3\n", environment)
        assert config.dataset("Ropa") == DatasetConfig(mode="max", settle_seconds=3)

    def test_dataset_keys_override_the_general_ones_singly(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """In a group too: a precision of its own keeps the general strangers."""
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

    def test_dataset_abstain_overrides_off(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """Its missing keys have the defaults then."""
        config = read(tmp_path, "abstain: off\ndatasets: {A: {abstain: {strangers: 0.1}}}", environment)
        assert config.dataset("A").abstain == AbstainConfig(precision=0.95, strangers=0.1)

    def test_dataset_with_a_key_of_the_program_is_refused(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """All datasets use one model."""
        lines = complaints(tmp_path, "datasets: {A: {model: packaged}}", environment)
        assert lines == ["1:16: datasets.A.model: unknown key; it cannot differ between datasets"]


class TestMistakes:
    """All at once, each as file:line:column: key: message."""

    def test_all_mistakes_are_reported_in_order(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """One error has all mistakes, in the order of the file."""
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
            ("backend: onxn", "1:1: backend: 'onxn' is none of auto, torch, onnx, socket:PATH; did you mean onnx?"),
            ("backend: 'socket:'", "1:1: backend: 'socket:' names no path of at most 107 bytes, as a socket has"),
            ("backend: [torch]", "1:1: backend: must be one value, not a list or a group of keys"),
            ("batch_size: 1.5", "1:1: batch_size: '1.5' is not a whole number"),
            ("prompts: []", "1:1: prompts: the list is empty; it needs at least one sentence"),
            ("prompts: a {}", "1:1: prompts: 'a {}' is not a list; write one `- ...` line for each"),
            ("mode: [max]", "1:1: mode: must be one value, not a list or a group of keys"),
            ("root: {a: b}", "1:1: root: must be one value, not a list or a group of keys"),
            ("- mode: max", "1:1: must be lines of `key: value`"),
            ("just text", "1:1: must be lines of `key: value`"),
            ("? [a, b]\n: c", "1:3: a key must be a word, not a list or a mapping"),
            ("model: ''", "1:1: model: must not be empty"),
            ("metrics: {http: x:1}", "1:11: metrics.http: 'x:1' is no address such as 127.0.0.1:9464, [::1]:9464, unix:PATH or a port"),  # noqa: E501
            ("metrics: {http: 'unix:'}", "1:11: metrics.http: 'unix:' names no path"),
            ('metrics: {http: "unix:/\\ud800"}', "1:11: metrics.http: 'unix:/\\ud800' names no path"),
            ('metrics: {http: "unix:/a\\0b"}', "1:11: metrics.http: 'unix:/a\\x00b' names no path"),
            ("metrics: {http: '9464', http_port: 9464}", "1:1: metrics: has both http and http_port; keep http"),
            ("notify: {summary_at: 25:00}", "1:10: notify.summary_at: '25:00' is no time of the day such as 08:00"),
            ("notify: {sumary_at: 8}", "1:10: notify.sumary_at: unknown key; did you mean summary_at?"),
            ("notify: {quiet_hours: 08:00}", "1:10: notify.quiet_hours: '' is no time of the day such as 08:00"),
            ("hooks: [{command: [a], events: [held]}]", "1:33: hooks.0.events.0: 'held' is none of review_pile, dataset_held, disk_missing, accuracy_low, class_proposed, daily_summary"),  # noqa: E501
            ("hooks: [{command: [a], event: [x]}]", "1:24: hooks.0.event: unknown key; did you mean events?"),
            ("hooks: [{events: []}]", "1:9: hooks.0.command: is missing; add it"),
            ("hooks: [{command: []}]", "1:10: hooks.0.command: the list is empty or has an empty program; it needs the program and its arguments"),  # noqa: E501
            ("hooks: [rm -rf]", "1:9: hooks.0: must be a group of keys, indented below it"),
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
    def test_mistake_has_its_position_and_message(
        self, tmp_path: Path, environment: dict[str, str], text: str, complaint: str
    ) -> None:
        """The first line of the error has the position and the message."""
        assert complaints(tmp_path, text, environment)[0] == complaint

    @pytest.mark.parametrize(
        "text",
        [
            "notify: {urls: json://user:sesame@host}",
            "notify: {urls: [{ulr: json://user:sesame@host}]}",
            "notify: {urls: [{url: [json://user:sesame@host]}]}",
            "notify: {urls: [{url: json://user:sesame@host, url_file: x}]}",
            "notify: {urls: [[json://user:sesame@host]]}",
            "notify: {urls: [{json://user:sesame@host: x}]}",
            "notify: {urls: [{json://user:sesame@host: x, url: json://user:sesame@host, url_file: json://sesame}]}",
            "notify: {urls: [json://user:sesame@host], json://user:sesame@host: x}",
            'notify: {urls: ["json://user:sesame@host]}',
            "notify: {urls: [json://user:sesame@host, x: y: z]}",
        ],
    )
    def test_mistake_beside_an_address_does_not_show_it(
        self, tmp_path: Path, environment: dict[str, str], text: str
    ) -> None:
        """An address contains a password, and messages end up in logs."""
        assert "sesame" not in "".join(complaints(tmp_path, text, environment))

    def test_given_file_that_is_missing_is_an_error(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """The defaults are not used in its place."""
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
    def test_hostile_file_is_refused(self, tmp_path: Path, environment: dict[str, str], name: str) -> None:
        """Each raises ConfigError, which names the file."""
        with pytest.raises(ConfigError, match=r"config\.yaml:\d+:\d+: "):
            read(tmp_path, HOSTILE[name], environment)

    @given(st.binary(max_size=300))
    def test_parse_of_random_bytes_returns_a_tree(self, content: bytes) -> None:
        """The tree has the mistakes of the document."""
        tree = config_yaml.parse(content)
        assert all(mistake.message and mistake.line >= 1 and mistake.column >= 1 for mistake in tree.mistakes)

    @given(st.text(alphabet="abcmode: {}[]&*!|>'\"\n\t-?,#%@`~", max_size=60))
    def test_parse_of_random_yaml_returns_a_tree(self, text: str) -> None:
        """No text raises an exception."""
        tree = config_yaml.parse(text.encode())
        assert all(mistake.line >= 1 and mistake.column >= 1 for mistake in tree.mistakes)


class TestVariables:
    """SORTD_... wins over the file."""

    def test_variables_set_each_kind_of_key(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """Plain and nested keys, keys of a dataset, and lists written as YAML can be set."""
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

    def test_variables_replace_groups_by_values_and_back(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """A group can be replaced by a word, and a word by a group."""
        assert read(tmp_path, "abstain: {precision: 0.9}", environment | {"SORTD_ABSTAIN": "off"}).abstain is None
        config = read(tmp_path, "abstain: off", environment | {"SORTD_ABSTAIN__PRECISION": "0.8"})
        assert config.abstain == AbstainConfig(precision=0.8)

    def test_paths_in_variables_are_relative_to_the_working_directory(
        self, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A shell completes paths from the working directory."""
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(elsewhere)
        assert read(tmp_path, "root: a", environment | {"SORTD_ROOT": "b"}).root == elsewhere / "b"

    def test_mistake_in_a_variable_names_it(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """An unknown variable is a mistake too."""
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

    def test_variable_names_are_distinct(self) -> None:
        """No two keys share a variable."""
        assert len({variable_name(key) for key in ALL_KEYS}) == len(ALL_KEYS)
        assert ("abstain", "precision") in ALL_KEYS
        assert ("datasets", "*", "abstain", "strangers") in ALL_KEYS


class TestSearch:
    """Where no file is named."""

    def test_find_config_file_takes_the_nearest(
        self, tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The order is the working directory, the user's folder, then the defaults with ./Data."""
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
            ("notify: {urls: [json://h], review_above: 3}\nhooks: [{command: [a]}]", []),
            ("model: packaged\nroot: elsewhere\n", ["model", "root"]),
            ("log: {format: json}\nmetrics: {http_port: 9000}\n", ["log.format", "metrics.http_port"]),
            ("decoding: {workers: 2}\n", ["decoding.workers"]),
        ],
    )
    def test_restart_needed_returns_changed_keys(
        self, tmp_path: Path, environment: dict[str, str], text: str, waits: list[str]
    ) -> None:
        """The keys that need a restart are returned by name."""
        before = read(tmp_path, "{}", environment)
        assert restart_needed(before, before) == []
        assert restart_needed(before, read(tmp_path, text, environment)) == waits

    def test_restart_needed_for_metrics_only_if_none_were_on(self, tmp_path: Path, environment: dict[str, str]) -> None:
        """What counts them begins at the start; where they go can change."""
        off, at = read(tmp_path, "{}", environment), read(tmp_path, "metrics: {http: 9000}", environment)
        assert restart_needed(off, at) == ["metrics.http"]
        assert restart_needed(at, off) == []
        assert restart_needed(at, read(tmp_path, "metrics: {http: 9001, textfile: a.prom}", environment)) == []

    def test_example_marks_the_keys_that_need_a_restart(self) -> None:
        """[restart] marks exactly the keys that restart_needed returns, or their group."""
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

    def test_example_has_every_key_with_its_default(self, environment: dict[str, str]) -> None:
        """The example is equal to the default configuration."""
        config = read_config(EXAMPLE, environment)
        nothing = read_config(None, environment | {"SORTD_ROOT": str(config.root)})
        assert config == nothing
        assert config.root == EXAMPLE.parent / "Data"

    def test_example_explains_every_key(self) -> None:
        """Each key of the model has a line with a comment."""
        reasons = reasons_in_the_example()
        assert reasons.keys() == KEYS
        assert [key for key, reason in reasons.items() if not reason] == []


def test_modes_and_defaults_are_those_of_classify() -> None:
    """The configuration repeats them, since an import of numpy would slow down --help."""
    assert set(get_args(ModeName)) == {mode.value for mode in Mode}
    assert DatasetConfig().mode == DecisionSettings().mode
    assert DatasetConfig().abstain is not None
    assert AbstainConfig().model_dump() == {
        "precision": AbstainSettings().precision,
        "strangers": AbstainSettings().strangers,
    }


@pytest.mark.parametrize("model", [AbstainConfig, Config, DatasetConfig, Decoding, Log, MetricsConfig, NotifyConfig])
def test_defaults_are_valid(model: type[BaseModel]) -> None:
    """The model does not validate its defaults, so this test does."""
    places: dict[str, Any] = dict.fromkeys(PLACES, "/x") if model is Config else {}
    defaults = model(**places)
    assert model.model_validate(defaults.model_dump()) == defaults


def test_import_of_config_loads_neither_torch_nor_numpy() -> None:
    """`sortd --help` and `check` import the configuration."""
    program = "import sys, sortd.config; print('numpy' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
