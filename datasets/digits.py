"""scikit-learn's handwritten digits: 1,797 images of 8x8, which come with the package.

E. Alpaydin, C. Kaynak (1998): Optical Recognition of Handwritten Digits. UCI Machine Learning Repository.
https://doi.org/10.24432/C50P49

There is no official split: a stratified fifth is held out for the test, determined by the seed.
"""

import torch

from datasets.pipeline.splits import DatasetSpec, Images, Loaded, Source


def load(source: Source, *, test_ratio: float = 0.2) -> Loaded:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(digits.target).long()
    indices = torch.arange(len(labels)).numpy()
    train, test = train_test_split(indices, test_size=test_ratio, stratify=digits.target, random_state=source.seed % 2**32)
    whole = Images(images, labels)
    return Loaded(whole.subset(torch.from_numpy(train)), whole.subset(torch.from_numpy(test)), tuple("0123456789"))


DATASETS = [DatasetSpec("digits", load, channels=1, img_size=8, mean=(0.3053,), std=(0.3760,), n_classes=10, crop_padding=1)]
