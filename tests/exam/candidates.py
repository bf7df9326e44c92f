"""The frameworks of the exam."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version


@dataclass(frozen=True)
class Candidate:
    """A framework and one of its documented ways to save."""

    title: str
    adapter: str  # a module of tests.exam.adapters
    package: str | None  # None: this project
    module: str  # imported once, before the trainings are forked
    checkpoint: str  # the file or folder that a resume reads, as a pattern
    save: str = "steps"
    data: tuple[str, ...] = ("digits", "pictures")
    two_ranks: bool = True  # False: it evaluates on several ranks only with GPUs
    issues: Mapping[str, Sequence[str]] = field(default_factory=dict)  # where a failure is known, by the question's name

    def version(self) -> str | None:
        """Return the installed version, or None."""
        try:
            return version(self.package) if self.package else ""
        except PackageNotFoundError:
            return None


CANDIDATES = {
    "ours": Candidate("this project", "ours", None, "main", "run/ckpt/step-*"),
    "lightning-epoch": Candidate(
        *("Lightning, each epoch", "lightning", "lightning", "lightning", "checkpoints/last.ckpt"),
        save="epoch",
        issues={"weights": ["Lightning-AI/pytorch-lightning#17543"]},
    ),
    "lightning-steps": Candidate(
        *("Lightning, within an epoch", "lightning", "lightning", "lightning", "checkpoints/last.ckpt"),
        issues={"samples": ["Lightning-AI/pytorch-lightning#19764", "Lightning-AI/pytorch-lightning#18780"]},
    ),
    "lightning-stateful": Candidate(
        *("Lightning, within an epoch, StatefulDataLoader", "lightning", "lightning", "lightning", "checkpoints/last.ckpt"),
        save="stateful",
    ),
    "transformers": Candidate(
        *("transformers Trainer", "transformers", "transformers", "transformers.trainer", "checkpoint-*"),
        issues={"resumed": ["huggingface/transformers#35525"]},
    ),
    "accelerate": Candidate("accelerate, skip_first_batches", "accelerate", "accelerate", "accelerate", "step_*"),
    "accelerate-stateful": Candidate(
        *("accelerate, StatefulDataLoader", "accelerate", "accelerate", "accelerate", "step_*"),
        save="stateful",
    ),
    "timm": Candidate("timm, the calls of train.py, each epoch", "timm", "timm", "timm.data", "last.pth.tar", save="epoch"),
    "composer": Candidate(
        *("Composer", "composer", "mosaicml", "composer", "checkpoints/latest-rank0.pt"),
        issues={"code": ["mosaicml/composer#3937"]},
    ),
    "ultralytics": Candidate(
        *("Ultralytics, each epoch", "ultralytics", "ultralytics", "ultralytics", "train/weights/last.pt"),
        save="epoch",
        data=("pictures",),
        two_ranks=False,
        issues={"weights": ["ultralytics/ultralytics#23973"]},
    ),
}
