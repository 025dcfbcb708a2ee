"""sortd but for its model: the real command, loop, worker, decoders and moves, with the fake encoder of the tests."""

import argparse
from pathlib import Path

from sortd import exits
from sortd.cli import read_quietly
from sortd.commands.encode import serve_encoder
from sortd.commands.run import file_once, run_daemon, show_dry_run
from sortd.config import Config
from tests.fake_encoder import FakeEncoder


def load_encoder(_: Config) -> FakeEncoder:
    """Return the fake encoder, whatever model is configured."""
    return FakeEncoder()


def main() -> None:
    """Do what ``sortd run``, ``sortd once`` and ``sortd encode`` do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["run", "once", "encode"])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("-v", "--verbose", action="store_true")
    parser.add_argument("-c", "--config", type=Path)
    parser.add_argument("--encoder-id", default=FakeEncoder().encoder_id)
    parser.add_argument("--socket", type=Path)
    parser.add_argument("--group")
    parser.add_argument("--metrics", type=Path)
    arguments = parser.parse_args()
    configured = read_quietly(arguments.config)
    with exits.exit_on_error():
        if arguments.command == "encode":
            encoder = FakeEncoder(encoder_id=arguments.encoder_id)
            serve_encoder(
                configured(),
                socket=arguments.socket,
                group=arguments.group,
                textfile=arguments.metrics,
                load_encoder=lambda _: encoder,
            )
        elif arguments.command == "once":
            show = show_dry_run if arguments.dry_run else file_once
            show(configured, as_json=arguments.json, verbose=arguments.verbose, load_encoder=load_encoder)
        else:
            run_daemon(configured, once=False, load_encoder=load_encoder)


if __name__ == "__main__":
    main()
