"""Run every benchmark and write one table."""

import json
import sys
import time

from tools.benchmark import run
from tools.benchmarks.report import Options, Report, report
from tools.benchmarks.training import RESNET_BATCH

TUNE = ["model", "--tune", "-c", "configs/resnet18_cifar10.yaml", "--train.batch_size"]
BUSY = ["--busy", "2"]
OTHERS = (["start"], ["evaluation", *BUSY], ["memory"], ["ranks"], ["growth"], ["checkpoint"], ["data", *BUSY])


def measure(options: Options) -> Report:
    begin = time.time()
    tuned = _report([*TUNE, str(options.choose(*RESNET_BATCH))], quick=options.quick)
    keys = [word for key, value in tuned.json["keys"].items() for word in (f"--{key}", json.dumps(value).strip('"'))]
    reports = {words[0]: _report(words, quick=options.quick) for words in (["training", *keys, *BUSY], *OTHERS)}
    reports = {"model": tuned, **reports}
    setting = f"in {(time.time() - begin) / 60:.0f} minutes{', roughly (--quick)' if options.quick else ''}"
    ratios = [ratio for one in reports.values() for ratio in one.ratios]
    left_out = sorted({name for one in reports.values() for name in one.left_out})
    return report(ratios, setting, left_out, measured={name: one.json for name, one in reports.items()})


def _report(words: list[str], *, quick: bool) -> Report:
    print(f"{' '.join(words)} ...", file=sys.stderr, flush=True)
    return run([*words, *(["--quick"] if quick else [])])[0]
