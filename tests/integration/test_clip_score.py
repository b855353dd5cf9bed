"""A CLIP score must read the whole of a long prompt. Run: pytest tests/integration/test_clip_score.py"""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from llmga.metrics.clip import Clip, load_clip
from llmga.metrics.clip_score import clip_scores, score_features, text_windows
from llmga.metrics.features import MetricError
from llmga.metrics.weights import MissingWeights
from tests.toy_evaluation import toy_clip_folder

START = " ".join(f"A small red circle lies at place {number} of the old wooden table." for number in range(7))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_clip_folder(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return load_clip(folder)


def pictures(count: int, height: int = 40, width: int = 64) -> Tensor:
    return torch.randint(0, 256, (count, 3, height, width), generator=torch.Generator().manual_seed(1)).byte()


def test_short_texts_score_as_open_clip_has_it(folder: Path, clip: Clip) -> None:
    network, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    network.eval()
    texts = ["a red circle on a dark table", "Two BLUE squares &amp; a star!"]
    shown = pictures(2)
    pixels = torch.stack([preprocess(Image.fromarray(picture.permute(1, 2, 0).numpy())) for picture in shown])
    with torch.no_grad():
        expected = cosine_similarity(network.encode_image(pixels), network.encode_text(open_clip.tokenize(texts)))
    found = clip_scores(clip, shown, texts)
    np.testing.assert_allclose(found.mean, expected, atol=1e-5)
    assert found.mean.tolist() == found.lowest.tolist() and found.windows.tolist() == [1, 1]
    assert found.long_share == 0
    assert (clip.dim, clip.window_tokens, clip.preprocessing) == (16, 75, "bicubic-crop-32")


def test_long_captions_that_differ_late_differ_in_score(clip: Clip) -> None:
    long = [f"{START} Behind it stands a {thing}." for thing in ("green vase", "silver horse")]
    cut = open_clip.tokenize(long)
    assert (cut[0] == cut[1]).all()  # what reading the first window alone would make of them
    found = clip_scores(clip, pictures(1).expand(2, -1, -1, -1), long)
    assert abs(found.mean[0] - found.mean[1]) > 1e-4
    assert found.windows.tolist() == [8, 8] and found.long_share == 1


def test_a_long_text_scores_the_mean_and_the_lowest_of_its_sentences(clip: Clip) -> None:
    text = f"{START} Behind it stands a green vase."
    sentences = [f"{part}." for part in text.rstrip(".").split(". ")]
    shown = pictures(1)
    alone = clip_scores(clip, shown.expand(len(sentences), -1, -1, -1), sentences)
    found = clip_scores(clip, torch.cat([pictures(1), pictures(1)]), [text, "a red circle"])
    assert found.mean[0] == pytest.approx(alone.mean.mean(), abs=1e-6)
    assert found.lowest[0] == pytest.approx(alone.mean.min(), abs=1e-6) and found.lowest[0] < found.mean[0]
    assert found.mean[1] == pytest.approx(clip_scores(clip, shown, ["a red circle"]).mean[0], abs=1e-6)
    assert found.windows.tolist() == [8, 1] and found.long_share == 0.5
    known = score_features(clip, clip.features(shown), [text])
    assert known.mean[0] == pytest.approx(found.mean[0], abs=1e-6)


def test_windows_hold_every_token_once(clip: Clip) -> None:
    tokenizer = clip.tokenizer
    exact = "table " * 75
    assert [len(window) for window in text_windows(exact, tokenizer)] == [75]
    assert [len(window) for window in text_windows(exact + "table", tokenizer)] == [38, 38]
    words = " ".join(f"extraordinarily{number}" for number in range(90))  # no sentence ends, words of several tokens
    for text in (words, f"{START}\n{words}! Short.", "漢" * 200, "x" * 700):
        windows = text_windows(text, tokenizer)
        assert [token for window in windows for token in window] == tokenizer.encode(text)
        assert max(map(len, windows)) <= 75
    whole = text_windows(words, tokenizer)
    assert all(tokenizer.decoder[window[-1]].endswith("</w>") for window in whole)
    assert len(whole) == -(-len(tokenizer.encode(words)) // 75)


def test_texts_that_cannot_be_scored(clip: Clip) -> None:
    shown = pictures(1)
    with pytest.raises(MetricError, match=r"text 0 \(A small red .*\): it has 98 tokens, and CLIP reads 75 at once"):
        clip_scores(clip, shown, [START], long_texts="refuse")
    with pytest.raises(MetricError, match=r"text 0 \( \): it is empty; leave out pictures without a text"):
        clip_scores(clip, shown, [" "])
    with pytest.raises(MetricError, match="holds a control token of CLIP, behind which nothing is read"):
        clip_scores(clip, shown, ["a <end_of_text> b"])
    with pytest.raises(MetricError, match="there are 1 pictures and 2 texts; expected one text for each"):
        clip_scores(clip, shown, ["a", "b"])
    with pytest.raises(MetricError, match="long_texts is 'cut'; expected one of windows, refuse"):
        clip_scores(clip, shown, ["a"], long_texts="cut")  # type: ignore[arg-type]
    with pytest.raises(MetricError, match=r"a window has 76 tokens; clip.* reads 75 at once"):
        clip.window_features([range(76)])


def test_weights_that_are_missing_or_of_another_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingWeights, match=r"clip-b32: .*nothing.pt is not a file"):
        load_clip("clip-b32", tmp_path / "nothing.pt")
    with pytest.raises(
        MetricError, match="CLIP 'clip-b16' is unknown; expected one of clip-l14, clip-b32, or a folder"
    ):
        load_clip("clip-b16")
    (tmp_path / "open_clip_config.json").write_text((folder / "open_clip_config.json").read_text())
    with pytest.raises(MissingWeights, match=r"open_clip_model.safetensors or .*open_clip_pytorch_model.bin"):
        load_clip(tmp_path)
    with pytest.raises(MetricError, match=r"open_clip_model.safetensors does not hold the weights of"):
        save_file({"visual.conv1.weight": torch.zeros(3)}, tmp_path / "open_clip_model.safetensors")
        load_clip(tmp_path)
