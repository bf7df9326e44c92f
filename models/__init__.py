"""Image backbones, one file per architecture family.

    create_model("resnet18", n_classes=10, first_block="cifar10")
    create_model("resnet50", pretrained="resnet50-0676ba61.pth")
    create_model("resnet50", features_only=True, out_indices=(1, 2, 3, 4))
    create_model("timm/convnext_tiny", n_classes=10)

Every module directly in this folder is a family. Its table `MODELS` maps names to constructors. A network provides:

    forward(x)                          logits; (logits, *auxiliary logits) in training mode if there are auxiliary heads
    forward_stages(x)                   the feature maps that `feature_info` describes, in its order
    forward_features(x)                 the input of the head, usually the last of these maps
    forward_head(x, pre_logits=False)   pooling and classifier; with pre_logits the embedding, of size `num_features`
    feature_info                        a list of {"num_chs", "reduction", "module"}
    HEAD                                names of the modules that only forward_head (or an auxiliary head) uses
    CLASSIFIERS                         names of the layers whose outputs are the classes
    FIRST_CONV                          name of the layer that reads the image

and, if published weights need it:

    convert_pretrained(weights)         renames weights of the reference implementation, or adapts them to the image size
    TIMM_NAMES                          maps the model's name here to its name in timm, for the published weights
    PUBLISHED_WITH                      attributes that the published weights were trained with
"""

from models.loading.factory import create_model, describes_network, list_models, model_signature, published_with

__all__ = ["create_model", "describes_network", "list_models", "model_signature", "published_with"]
