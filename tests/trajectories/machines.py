"""Machines that compute the same curves with other roundings: kernels for other processors, threads, versions of torch."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tests.running import ROOT
from tests.trajectories.curves import Curve

# Up to which instructions torch, oneDNN and MKL choose their kernels
PLAIN = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}
AVX = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX", "MKL_CBWR": "AVX"}
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"}
AVX512 = {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "MKL_CBWR": "AVX512"}


@dataclass(frozen=True)
class Machine:
    name: str
    threads: int = 1
    noise: int | None = None  # a seed of rounding_noise
    kernels: dict[str, str] = field(default_factory=dict)
    python: str = sys.executable

    def curves(self, recipes: Sequence[str]) -> dict[str, Curve]:
        """Train the recipes in a new process, which reads the variables when it loads torch."""
        with tempfile.TemporaryDirectory(prefix="curves-") as folder:
            file = Path(folder) / "curves.json"
            command = [self.python, "-m", "tests.trajectories", "curves", str(file), *recipes, "--threads", str(self.threads)]
            command += ["--noise", str(self.noise)] if self.noise is not None else []
            env = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "TMPDIR": folder, **self.kernels}
            ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
            if ended.returncode:
                raise RuntimeError(f"{self.name}: {ended.stdout[-2000:]}{ended.stderr[-4000:]}")
            return json.loads(file.read_text())


# The band is derived from these, and from other versions of torch if there are any.
FOR_BAND = [
    Machine("SSE, 1 thread", kernels=PLAIN),
    Machine("AVX, 2 threads", 2, kernels=AVX),
    Machine("AVX2, 1 thread", kernels=AVX2),
    Machine("AVX2, 3 threads", 3, kernels=AVX2),
    Machine("AVX-512, 2 threads", 2, kernels=AVX512),
    *(Machine(f"rounding noise {seed}", noise=seed) for seed in range(8)),
]

# These must cause no alarm. None of them is one of the machines above.
CLEAN = [
    Machine("AVX, 1 thread", kernels=AVX),
    Machine("AVX, 3 threads", 3, kernels=AVX),
    Machine("AVX2, 2 threads", 2, kernels=AVX2),
    Machine("AVX2, 4 threads", 4, kernels=AVX2),
    Machine("AVX-512, 3 threads", 3, kernels=AVX512),
    Machine("AVX-512, 4 threads", 4, kernels=AVX512),
    *(Machine(f"AVX, 1 thread, rounding noise {seed}", 1, seed, AVX) for seed in range(110, 113)),
    *(Machine(f"AVX2, 1 thread, rounding noise {seed}", 1, seed, AVX2) for seed in range(120, 125)),
    *(Machine(f"rounding noise {seed}", noise=seed) for seed in range(130, 135)),
    Machine("SSE, 2 threads", 2, kernels=PLAIN),
]


def on_all(machines: Sequence[Machine], recipes: Sequence[str]) -> Iterator[dict[str, Curve]]:
    """Yield the curves of each machine, in order."""
    with ThreadPoolExecutor(2) as pool:
        for machine, found in zip(machines, pool.map(lambda machine: machine.curves(recipes), machines), strict=True):
            print(f"{machine.name}: trained", file=sys.stderr, flush=True)
            yield found
