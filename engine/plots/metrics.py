"""Names of metrics and units of time, as figures and tables show them."""

from collections.abc import Container

MONITORED = ("acc@1", "mIoU", "mAP")  # of classification; segmentation; multilabel and detection
# Fractions of 1 that are printed in percent.
IN_PERCENT: tuple[str, ...] = (*MONITORED, "acc@5", "balanced_acc", "ece", "f1_micro", "f1_macro", "pixel_acc", "mean_acc")
IN_PERCENT += ("mAP@50", "mAP@75", "mAR@100")
TIME_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))


def monitored_in(logged: Container[str]) -> str:
    """Return the metric that a run with these tags probably monitors."""
    return next((name for name in MONITORED if f"valid/{name}" in logged), MONITORED[0])
