"""Sample pages are whole in one file, escape what models and people write, and follow a resumed run."""

from pathlib import Path

from PIL import Image

from llmga.stage1.conversation import Turn
from llmga.stage1.sample_page import Question, SamplePages

QUESTIONS = [
    Question(
        [Turn("user", "what <script>?", True)], "<gen_img> a red disc </gen_img>", Image.new("RGB", (9, 9)), "similar"
    ),
    Question([Turn("user", "hello")], "hi"),
]


def test_pages_show_all_and_are_self_contained(tmp_path: Path) -> None:
    pages = SamplePages(tmp_path / "samples", QUESTIONS)
    page = pages.write(3, ["<gen_img> a <b>blue</b> disc", "hi & bye"]).read_text()
    assert "what &lt;script&gt;?" in page and "<script" not in page
    assert "<b>&lt;gen_img&gt;</b> a &lt;b&gt;blue&lt;/b&gt; disc" in page
    assert "hi &amp; bye" in page and "no picture" in page and 'src="data:image/png;base64,' in page
    assert "http" not in page and "<link" not in page


def test_the_index_follows_each_conversation_and_forgets_what_a_resume_redoes(tmp_path: Path) -> None:
    pages = SamplePages(tmp_path, QUESTIONS)
    for step in (2, 4, 6):
        pages.write(step, [f"first {step}", f"second {step}"])
    index = (tmp_path / "index.html").read_text()
    assert index.index("first 6") < index.index("first 4") < index.index("first 2")
    assert 'href="step-4.html"' in index
    pages.cut_after(4)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-2.html", "step-4.html"]
    pages.write(6, ["again", "again"])
    assert "first 6" not in (tmp_path / "index.html").read_text()
