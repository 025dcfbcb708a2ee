"""The lock files, the Debian package and the container, installed and used for real.

The long tests need root, mmdebstrap and what ``make deb`` built: ``make deb-test``, ``make container-test``.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

import pytest
import yaml

from tests.daemon_process import PATIENCE_SECONDS, make_dataset, picture

REPOSITORY = Path(__file__).parents[1]
PACKAGING = REPOSITORY / "packaging"
LOCKS = (PACKAGING / "requirements.lock", PACKAGING / "service.lock")


def pins(lock: Path) -> dict[str, str]:
    """Return the text of each package in a lock file, with its hashes, by name."""
    blocks = re.split(r"^(?=[a-z0-9])", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {block.split("==")[0]: block for block in blocks}


def names(requirements: list[str]) -> set[str]:
    """Return the names of requirements as lock files spell them."""
    return {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=; ]", requirement)[0]).lower() for requirement in requirements}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_lock_every_package_has_hashes_and_no_address(lock: Path) -> None:
    """A lock file names versions and hashes, and neither a package index nor a folder, nor torch."""
    text = lock.read_text(encoding="utf-8")
    assert not re.findall(r"://|^-|^\s*# (?:from|via) ", text, re.MULTILINE)
    assert all("--hash=sha256:" in block for block in pins(lock).values())
    assert not [name for name in pins(lock) if re.match(r"torch$|triton$|nvidia-|cuda-", name)]


def test_lock_covers_every_requirement_of_the_project() -> None:
    """What pyproject.toml asks for is locked, all but torch; `make lock` adds what is missing."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    base = names(project["project"]["dependencies"]) - {"torch"}
    extras = names([one for extra in project["project"]["optional-dependencies"].values() for one in extra])
    assert base | extras | names(project["dependency-groups"]["dev"]) <= set(pins(LOCKS[0]))
    assert base <= set(pins(LOCKS[1])) <= set(pins(LOCKS[0]))


# ---------------------------------------------------------------- packaging/install_locked


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder with one wheel, which is all that pip may install from."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "locked_example-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("locked_example.py", "")
        info = "locked_example-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: locked-example\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


def install(index: Path, *, version: str, digest: str) -> subprocess.CompletedProcess[str]:
    """Install a lock file of one package into a folder, from the index alone."""
    lock = index.parent / "example.lock"
    lock.write_text(f"locked-example=={version} \\\n    --hash=sha256:{digest}\n")
    return subprocess.run(
        [PACKAGING / "install_locked", sys.executable, lock, "--target", index.parent / "installed"],
        capture_output=True,
        text=True,
        check=False,
        env={
            "PATH": os.environ["PATH"],
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": os.fspath(index),
        },
    )


def test_install_locked_right_hash_installs(index: Path) -> None:
    """The version in the lock file is installed, and nothing is said."""
    digest = hashlib.sha256(next(index.iterdir()).read_bytes()).hexdigest()
    done = install(index, version="1.0", digest=digest)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    assert (index.parent / "installed" / "locked_example.py").exists()


def test_install_locked_missing_version_warns_and_goes_on(index: Path) -> None:
    """An index that lacks a version is no error: the versions are then chosen by pip, and the output says so."""
    done = install(index, version="2.0", digest="0" * 64)
    assert done.returncode == 0
    assert "WARNING" in done.stderr
    assert "without checking hashes" in done.stderr


def test_install_locked_wrong_hash_fails(index: Path) -> None:
    """Another file under the same name and version is an error, and is not installed."""
    done = install(index, version="1.0", digest="0" * 64)
    assert done.returncode == 1
    assert "other files" in done.stderr
    assert not (index.parent / "installed").exists()


# ---------------------------------------------------------------- packaging/audit.py


class Database(BaseHTTPRequestHandler):
    """A database that knows of one vulnerability, in pillow."""

    def do_POST(self) -> None:
        """Answer a batch of queries, or with what the path of the address says."""
        queries = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["queries"]
        results = [{"vulns": [{"id": "TEST-1"}]} if one["package"]["name"] == "pillow" else {} for one in queries]
        self.send_response(200)
        self.end_headers()
        said = unquote(self.path.removeprefix("/"))
        self.wfile.write(said.encode() if said else json.dumps({"results": results}).encode())

    def log_message(self, *arguments: object) -> None:
        """Log nothing."""


def audit(address: str) -> subprocess.CompletedProcess[str]:
    """Look up the lock file of the set-up."""
    command = [sys.executable, os.fspath(PACKAGING / "audit.py"), os.fspath(LOCKS[0]), address]
    no_proxy = {**os.environ, "no_proxy": "*"}  # of a user's environment
    return subprocess.run(command, capture_output=True, text=True, check=False, env=no_proxy)


def audit_answered(answer: str = "") -> subprocess.CompletedProcess[str]:
    """Look it up in a database of this process; an ``answer`` replaces its own."""
    with HTTPServer(("127.0.0.1", 0), Database) as server:
        server.timeout = PATIENCE_SECONDS
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        done = audit(f"http://127.0.0.1:{server.server_port}/{quote(answer)}")
        thread.join()
    return done


def test_audit_known_vulnerability_is_printed_and_fails() -> None:
    """The versions are asked for in one request; what the database knows is printed."""
    done = audit_answered()
    version = re.findall(r"pillow==(\S+)", pins(LOCKS[0])["pillow"])[0]
    assert (done.returncode, done.stderr) == (1, "")
    assert f"pillow {version}: TEST-1" in done.stdout.splitlines()


def test_audit_no_database_says_so_and_goes_on() -> None:
    """A machine without the network can be checked for all else."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    done = audit(f"http://127.0.0.1:{port}/")
    assert (done.returncode, done.stdout) == (0, "")
    assert "not checked" in done.stderr


@pytest.mark.parametrize("answer", ["<html>", "[]", '{"results": null}', '{"results": [{}]}', '{"error": "busy"}'])
def test_audit_another_answer_says_so_and_goes_on(answer: str) -> None:
    """The login page of a network and an error are no result."""
    done = audit_answered(answer)
    assert (done.returncode, done.stdout) == (0, "")
    assert "not checked" in done.stderr


# ---------------------------------------------------------------- the Debian package and the container


def need(*programs: str) -> None:
    """Skip if this is not root or a program is missing."""
    missing = [program for program in programs if shutil.which(program) is None]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root{''.join(f' and {program}' for program in missing)}")


def wait(claim: Callable[[], object], what: str, log: Callable[[], str]) -> None:
    """Wait until a claim holds."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not claim():
        assert time.monotonic() < deadline, f"{what} did not come:\n{log()}"
        time.sleep(0.2)


def output(*command: str | os.PathLike[str], environment: dict[str, str] | None = None) -> str:
    """Run a command, which must end well, and return what it prints."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )
    assert done.returncode == 0, f"{command}: {done.stdout[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that every user may enter, for a whole system."""
    with tempfile.TemporaryDirectory(prefix="sortd-packages-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def debian(folder: Path) -> Path:
    """A Debian with systemd, in which apt has installed the package while no systemd was running."""
    need("mmdebstrap", "unshare", "nsenter")
    packages = sorted((REPOSITORY / "dist").glob("sortd_*.deb"))
    if not packages:
        pytest.skip("no dist/sortd_*.deb: make deb builds it")
    root = folder / "debian"
    output(
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        "--include=systemd-sysv,dbus",
        f"--customize-hook=upload {packages[-1]} /sortd.deb",
        '--customize-hook=chroot "$1" apt-get install --yes --quiet /sortd.deb',
        '--customize-hook=rm "$1"/sortd.deb',
        release(),
        root,
    )
    return root


def release() -> str:
    """Return the name of the Debian release that this machine runs."""
    facts = Path("/etc/os-release").read_text(encoding="utf-8")
    found = re.search(r"^VERSION_CODENAME=(\w+)", facts, re.MULTILINE)
    if not re.search(r"^ID=debian", facts, re.MULTILINE) or found is None:
        pytest.skip("this is no Debian")
    return found.group(1)


@pytest.mark.long
def test_deb_image_is_filed_and_removal_keeps_data(debian: Path, folder: Path) -> None:
    """The service starts at boot and files an image; remove stops it; purge takes settings and cache; data stay."""
    lab, scratch, srv, state = REPOSITORY / "tests" / "systemd_lab", folder / "lab", folder / "srv", folder / "state"
    srv.mkdir()
    state.mkdir()
    dataset = make_dataset(srv)
    boot = subprocess.run(
        [lab, "boot", scratch, f"{srv}:/srv/sortd", f"{state}:/var/lib/sortd"],
        env={**os.environ, "SYSTEMD_LAB_ROOT": os.fspath(debian)},
        capture_output=True,
        text=True,
        check=False,
    )
    if boot.returncode == 77:
        pytest.skip(boot.stderr.strip())
    assert boot.returncode == 0, boot.stderr

    def run(*command: str) -> str:
        return output(lab, "run", scratch, *command)

    def log() -> str:
        return run("journalctl", "--no-pager", "--lines=40")

    try:
        assert run("systemctl", "is-enabled", "sortd").strip() == "enabled"
        run("chown", "-R", "sortd:sortd", "/srv/sortd", "/var/lib/sortd")
        run("sh", "-c", "echo 'abstain: off' >>/etc/sortd/config.yaml && systemctl restart sortd")
        picture("red", 7).save(dataset / "Images" / "new.png")
        run("chown", "sortd:sortd", "/srv/sortd/Colours/Images/new.png")
        filed = dataset / "Dataset" / "red" / "new.png"
        wait(filed.exists, os.fspath(filed), log)
        assert "new.png" in run("runuser", "-u", "sortd", "--", "sortd", "history")
        assert run("systemd-analyze", "verify", "/usr/lib/systemd/system/sortd.service") == ""
        files = run("dpkg", "--listfiles", "sortd")
        for path in (
            "lib/systemd/system/sortd-review.socket",
            "share/man/man1/sortd.1.gz",
            "share/zsh/site-functions/_sortd",
        ):
            assert f"/usr/{path}\n" in files

        run("dpkg", "--remove", "sortd")
        assert subprocess.run([lab, "run", scratch, "pgrep", "-u", "sortd"], check=False).returncode != 0
        assert "abstain: off" in run("cat", "/etc/sortd/config.yaml")
        assert run("sh", "-c", "ls /usr/lib/sortd /usr/bin/sortd 2>/dev/null || true") == ""
        run("dpkg", "--purge", "sortd")
        assert run("sh", "-c", "ls -d /etc/sortd /var/cache/sortd 2>/dev/null || true") == ""
        assert filed.exists()
        assert list(state.rglob("journal.sqlite"))
        assert "sortd" in run("id", "-un", "sortd")
    finally:
        output(lab, "stop", scratch)


@pytest.fixture(scope="module")
def podman(folder: Path) -> Iterator[list[str]]:
    """The command of a podman with images of its own, among mounts in which its runtime finds control groups."""
    need("mmdebstrap", "podman", "buildah", "unshare", "nsenter")
    unified = "mount -t cgroup2 cgroup2 /sys/fs/cgroup && echo ready && cat"
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", unified],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdin is not None
        assert holder.stdout is not None
        assert holder.stderr is not None
        if holder.stdout.readline() != "ready\n":
            pytest.skip(f"namespaces are not allowed here: {holder.stderr.read()}")
        storage = ["--root", f"{folder}/images", "--runroot", f"{folder}/run", "--storage-driver", "overlay"]
        command = ["nsenter", "--target", str(holder.pid), "--mount", "--"]
        try:
            yield [*command, "podman", *storage, "--cgroup-manager", "cgroupfs"]
        finally:
            subprocess.run([*command, "umount", f"{folder}/images/overlay"], capture_output=True, check=False)
            holder.stdin.close()


@pytest.fixture(scope="module")
def image(podman: list[str], folder: Path) -> str:
    """The name of an image that the Containerfile made, from a Debian that mmdebstrap made."""
    base = folder / "base.tar"
    output("mmdebstrap", "--quiet", "--variant=minbase", "bookworm", base)
    output(*podman, "import", base, "localhost/debian:bookworm-slim")
    build = [*(word if word != "podman" else "buildah" for word in podman[: podman.index("--cgroup-manager")]), "build"]
    # An index that only this machine reaches: CONTAINER_OPTIONS="--volume ... --build-arg TORCH_INDEX=...".
    options = os.environ.get("CONTAINER_OPTIONS", "").split()
    base_image = ("--build-arg", "BASE=localhost/debian:bookworm-slim")
    output(*build, "--isolation", "chroot", *base_image, *options, "--tag", "localhost/sortd", REPOSITORY)
    return "localhost/sortd"


@pytest.mark.long
def test_container_image_in_the_volume_is_filed(podman: list[str], image: str, folder: Path) -> None:
    """Confined as compose.yaml says, as another user than root, an image in the volume is filed."""
    data = folder / "data"
    dataset = make_dataset(data / "images")
    output("chown", "-R", "1000:1000", data)
    service = yaml.safe_load((REPOSITORY / "compose.yaml").read_text(encoding="utf-8"))["services"]["sortd"]
    confined = [f"--read-only={service['read_only']}", f"--network={service['network_mode']}", "--user=1000:1000"]
    for option, key in (("cap-drop", "cap_drop"), ("security-opt", "security_opt"), ("tmpfs", "tmpfs")):
        confined += [f"--{option}={value}" for value in service[key]]
    here = "--cgroups=disabled --ulimit=nofile=4096:4096 --ulimit=nproc=4096:4096 --log-driver=k8s-file"
    [volume] = service["volumes"]
    started = [*podman, "run", "--detach", "--name=sortd", "--env=SORTD_ABSTAIN=off"]
    output(*started, *confined, *here.split(), f"--volume={volume.replace('./data', os.fspath(data))}", image)
    try:

        def log() -> str:
            return output(*podman, "logs", "--tail=40", "sortd")

        picture("red", 7).save(data / "new.png")
        os.chown(data / "new.png", 1000, 1000)
        (data / "new.png").rename(dataset / "Images" / "new.png")
        filed = dataset / "Dataset" / "red" / "new.png"
        wait(filed.exists, os.fspath(filed), log)
        output(*podman, "exec", "sortd", *service["healthcheck"]["test"][1:])
        assert "Read-only" in output(*podman, "exec", "sortd", "sh", "-c", "touch /etc/x 2>&1 || true")
        output(*podman, "stop", "--time=60", "sortd")
        assert "daemon.stopped" in log()
        assert output(*podman, "inspect", "--format={{.State.ExitCode}}", "sortd").strip() == "0"
    finally:
        output(*podman, "rm", "--force", "sortd")
