"""Where a model looks: Grad-CAM, and the attention rollout of a Vision Transformer."""

from argparse import Namespace
from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from engine.config.errors import ConfigError
from tools.pictures.columns import Row, draw_columns
from tools.pictures.output import add_output, deliver, new_figure
from tools.pictures.subject import SOURCE, USAGE, add_images, add_source, expect_classes, name_of, open_source, subjects_of

if TYPE_CHECKING:
    from torch import Tensor

EXAMPLES = """
Grad-CAM answers for a class, the predicted one or --target, and looks at the last stage that has 7x7 places or more, or at
--layer. The rollout follows attention from layer to layer to the class token, whatever the class; it is the default where every
layer attends to all patches.

examples:
  python tools/visualize.py gradcam runs/first
  python tools/visualize.py gradcam resnet50 photo.jpg --target "tabby"
  python tools/visualize.py gradcam timm/vit_small_patch16_224 photos/ --method gradcam --layer blocks.9.norm1
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "gradcam",
        help="where a model looks",
        description=__doc__,
        epilog=SOURCE + EXAMPLES,
        usage="%(prog)s RUN_OR_MODEL [IMAGE ...] [--method gradcam|rollout] [--target CLASS] [--layer NAME] "
        "[--n N | --samples I ...] [--split SPLIT] " + USAGE,
    )
    add_source(parser)
    add_images(parser, n=8)
    parser.add_argument("--method", choices=("gradcam", "rollout"), help="default: rollout for a ViT, gradcam for others")
    parser.add_argument("--target", metavar="CLASS", help="by its name or number (default: the predicted one)")
    parser.add_argument("--layer", metavar="NAME", help="of Grad-CAM (default: the last stage that is fine enough)")
    add_output(parser, "gradcam.png, in figures/ of a run")
    parser.set_defaults(run=run)


def run(args: Namespace, overrides: dict[str, Any]) -> int:
    import torch

    from engine.plots.images import class_titles
    from tools.pictures.attention import attends_to_all, rollout_maps
    from tools.pictures.cam import default_layer, gradcam

    if args.method == "rollout" and (args.target or args.layer):
        raise ConfigError("--target and --layer are for --method gradcam: the rollout is of all layers, and of no class")
    trained = open_source(args, overrides)
    expect_classes(trained.task, trained.config, "gradcam")
    target = class_number(args.target, trained.classes) if args.target is not None else None
    subjects = subjects_of(args, trained)
    may_roll = args.method is None and args.target is None and args.layer is None
    if args.method == "rollout" or (may_roll and attends_to_all(trained.model, subjects.inputs[:1])):
        maps, how = rollout_maps(trained.model, subjects.inputs), "attention rollout"
    else:
        layer = args.layer or default_layer(trained.model, subjects.inputs)
        targets = None if target is None else torch.full((len(subjects.inputs),), target, device=subjects.inputs.device)
        maps, _ = gradcam(trained.model, subjects.inputs, layer, targets)
        how = f"Grad-CAM at {layer}" + (f" for {trained.classes[target]}" if target is not None else "")
    with torch.no_grad():
        probabilities = trained.task.predict(trained.model, (subjects.inputs, subjects.labels)).cpu()
    images = subjects.images.cpu()
    seen = Row(how.partition(" at ")[0], overlay(images, over_image(maps, images.shape[-1]).cpu()))
    image = Row("image", images, *class_titles(probabilities, trained.classes, subjects.labels, subjects.names))
    draw_columns(figure := new_figure(args), [image, seen], f"{name_of(trained)}: {how}")
    deliver({"gradcam": figure}, args, trained.run_dir, trained.step)
    return 0


def class_number(said: str, classes: Sequence[str]) -> int:
    lower = [name.lower() for name in classes]
    if said.lower() in lower:
        return lower.index(said.lower())
    if said.isdecimal() and int(said) < len(classes):
        return int(said)
    near = get_close_matches(said.lower(), lower, n=3)
    hint = f"did you mean {' or '.join(classes[lower.index(name)] for name in near)}?" if near else f"there are {len(classes):,}"
    raise ConfigError(f"--target {said}: no such class; {hint}")


def over_image(maps: "Tensor", size: int) -> "Tensor":
    """B H W, laid over the image and scaled to reach from 0 to 1 in each."""
    from torch.nn import functional as F

    maps = F.interpolate(maps.unsqueeze(1), (size, size), mode="bilinear")[:, 0]
    lowest, highest = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - lowest) / (highest - lowest).clamp_min(1e-12)


def overlay(images: "Tensor", heat: "Tensor") -> "Tensor":
    """N 3 H W: dark where the model doesn't look, and light where it does."""
    import matplotlib
    import torch

    from engine.plots.style import HEAT

    colors = torch.from_numpy(matplotlib.colormaps[HEAT](heat.numpy())[..., :3]).permute(0, 3, 1, 2).float()
    return 0.4 * images.mean(1, keepdim=True) + 0.6 * colors
