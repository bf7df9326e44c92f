"""Image backbones, one file per architecture family.

    create_model("resnet18", n_classes=10, first_block="cifar10")
    create_model("resnet50", pretrained="resnet50-0676ba61.pth")
    create_model("resnet50", features_only=True, out_indices=(1, 2, 3, 4))
    create_model("timm/convnext_tiny", n_classes=10)

A family file holds a table `MODELS`, name -> constructor, and is found by being here. What its network promises:

    forward(x)                          logits; (logits, *auxiliary logits) in training mode where there are auxiliary heads
    forward_stages(x)                   the feature maps that `feature_info` describes, in its order
    forward_features(x)                 the last of them, as the head takes it
    forward_head(x, pre_logits=False)   pooling and classifier; with pre_logits the embedding of `num_features` numbers
    feature_info                        a list of {"num_chs", "reduction", "module"}
    HEAD                                names of the modules that only forward_head (or an auxiliary head) uses
    CLASSIFIERS                         names of the layers whose outputs are the classes
    FIRST_CONV                          name of the layer that reads the image

and, where published weights need it:

    convert_pretrained(weights)         gives weights of the reference implementation the names that the model has
    TIMM_NAMES                          the model's name here -> its name in timm, for the published weights
    PUBLISHED_WITH                      attributes that the published weights were trained with
"""

from models.loading.factory import create_model, list_models, model_signature, published_with

__all__ = ["create_model", "list_models", "model_signature", "published_with"]
