"""sortd but for its model: the real command, loop, worker, decoders and moves, with the fake encoder of the tests."""

import argparse
from pathlib import Path

from sortd import cli
from sortd.config import Config
from tests.fake_encoder import FakeEncoder


def load_encoder(_: Config) -> FakeEncoder:
    """Return the fake encoder, whatever model is configured."""
    return FakeEncoder()


def main() -> None:
    """Do what ``sortd run`` and ``sortd once`` do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["run", "once"])
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("-c", "--config", type=Path)
    arguments = parser.parse_args()
    with cli.exit_on_error():
        if arguments.dry_run:
            cli.print_dry_run(arguments.config, as_json=False, load_encoder=load_encoder)
        else:
            cli.work(arguments.config, once=arguments.command == "once", load_encoder=load_encoder)


if __name__ == "__main__":
    main()
