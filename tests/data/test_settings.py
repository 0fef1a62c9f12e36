"""Data settings check themselves."""

import pytest

from pss_composer.data.settings import SOURCES, DataSettings


def find_errors(**settings):
    return {error.key: str(error) for error in DataSettings(**settings).check()}


def test_sources_are_the_files_in_their_folder():
    assert SOURCES == ("digits", "folder", "streaming", "synthetic", "torchvision")


@pytest.mark.parametrize("settings", [
    {"name": "synthetic"}, {"name": "folder", "path": "x", "num_workers": 0}, {"name": "digits", "path": "x"},
    {"name": "streaming", "remote": "s3://bucket/set", "local": "x"},
    {"name": "torchvision", "path": "x", "dataset": "MNIST", "download": True},
])
def test_good_settings(settings):
    assert find_errors(**settings) == {}


@pytest.mark.parametrize(("settings", "message"), [
    ({"name": "foldr", "path": "x"}, "name must be one of digits, folder, streaming, synthetic, torchvision "
                                     "(did you mean folder?), got 'foldr'"),
    ({"name": "imagenet", "path": "x"}, "name must be one of digits, folder, streaming, synthetic, torchvision, "
                                        "got 'imagenet'"),
    ({"name": "folder"}, "path must be a folder, got None"),
    ({"num_workers": -1}, "num_workers must be in [0, 1024], got -1"),
    ({"num_workers": 99999}, "num_workers must be in [0, 1024], got 99999"),
    ({"num_samples": 0}, "num_samples must be at least 1, got 0"),
    ({"on_bad_sample": "ignore"}, "on_bad_sample must be one of raise, skip, got 'ignore'"),
    ({"dataset": "MNIST"}, "dataset must be null unless name=torchvision, got 'MNIST'"),
    ({"download": True}, "download must be false unless name=torchvision, got True"),
])
def test_bad_settings(settings, message):
    assert list(find_errors(**{"name": "synthetic"} | settings).values()) == [message]


@pytest.mark.parametrize(("dataset", "nearest"), [
    ("FashionMNST", "FashionMNIST"), ("cifar10", None), ("EuroSAT", None), (None, None), ("CIFAR-100", "CIFAR100"),
])
def test_data_sets_of_torchvision_by_name(dataset, nearest):
    message = find_errors(name="torchvision", path="x", dataset=dataset)["dataset"]
    hint = f" (did you mean {nearest}?)" if nearest else ""
    assert message.startswith("dataset must be one of CIFAR10, CIFAR100, FashionMNIST, ") and "\n" not in message
    assert message.endswith(f"{hint}, got {dataset!r}")


def test_all_mistakes_are_reported_together():
    errors = find_errors(name="torchvision", num_workers=99999, dataset="MNST")
    assert sorted(errors) == ["dataset", "num_workers", "path"]
