#!/usr/bin/env python
"""Train an image backbone as a YAML config describes."""

import sys
from collections.abc import Sequence

from engine import load_config, train
from engine.config.command_line import run_tool
from engine.config.schema import to_yaml
from engine.plugins import Parser, require_run_plugins
from engine.run.folder import find_resumption

EXAMPLES = """
every key of the config is an option too:
  --train.optim.type Adam --train.optim.lr=1e-3 --train.optim.betas [0.9,0.95] --data.valid_ratio null

examples:
  python main.py                                                  LeNet on handwritten digits, no download
  accelerate-launch main.py -c configs/resnet18_cifar10.yaml      on the devices that `accelerate config` names
  python main.py -c configs/resnet18_cifar10.yaml --train.n_epochs 30 -e runs/first
  python main.py -e runs/first -r latest                          continue where it stopped
"""


def parser() -> Parser:
    options = Parser(
        prog="main.py",
        usage="%(prog)s [-c CONFIG] [-e EXP_DIR] [-r RESUME] [--plugin FILE.py] [--key.sub value ...]",
        description=__doc__,
        epilog=EXAMPLES,
    )
    options.add_argument("-c", "--config", help="a YAML of configs/; without it, LeNet on digits")
    options.add_argument("-e", "--exp_dir", help="the run's folder (default: runs/exp-<time>)")
    options.add_argument(
        "-r", "--resume", metavar="RESUME", help="latest, best or auto (with -e), or the path of a run or a checkpoint"
    )
    options.add_argument("--print_config", action="store_true", help="print the resolved config, and exit")
    options.add_argument("--dry_run", action="store_true", help="build everything, train two steps, evaluate one batch, and exit")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    args, overrides = parser().parse_with_overrides(argv)
    resumption = find_resumption(args.resume, args.exp_dir)
    if resumption:
        require_run_plugins(resumption.run_dir)
    config = load_config(resumption.run_dir / "config.yaml" if resumption else args.config, overrides)
    if args.print_config:
        print(to_yaml(config), end="")
        return 0
    may_hold_a_run = args.resume == "auto"
    return train(config, exp_dir=args.exp_dir, resume=resumption, may_hold_a_run=may_hold_a_run, dry_run=args.dry_run).exit_code


if __name__ == "__main__":
    sys.exit(run_tool(main))
