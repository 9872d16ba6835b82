"""The HTML report: whole, self-contained, escaped, and right about what differs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gpt.text.comparison import Comparison, SummarizeConfig
from gpt.text.dataset import Article
from gpt.text.evaluation import Side, SideResult
from gpt.text.report import render
from gpt.text.rouge import aggregate, score_texts

VOID = {"meta", "input", "br", "use", "path"}
EVIL = '<script>alert("1")</script> & <b>bold</b>'
ARTICLES = [
    Article(0, f"{EVIL} first", f"a fast library {EVIL}"),
    Article(1, "word " * 200, "documentation"),
    Article(2, "third", "tools for tests"),
]


class Page(HTMLParser):
    """Collects what a browser would load, and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.marks: dict[str, list[str]] = {}
        self._mark = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.loaded += [str(values[name]) for name in ("src", "href", "data", "xlink:href") if name in values]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "mark":
            self._mark = values.get("class") or ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag
        self._mark = "" if tag == "mark" else self._mark

    def handle_data(self, data: str) -> None:
        if self._mark:
            self.marks.setdefault(self._mark, []).append(data)


def _result(name: str, tokens: list[list[int]], texts: list[str]) -> SideResult:
    scores = score_texts([article.reference for article in ARTICLES], texts)
    steps = [[1.0, 2.0], [3.0], [2.0, 2.0, 9.0]]
    side = Side(name, name, lambda prompts, *, first_row: pytest.fail("a report generates nothing"))
    return SideResult(side, tokens, texts, scores, aggregate(scores), 2.0, [5.0, 6.0, 7.0], steps)


OURS = _result("Engine", [[1, 2], [3], [4, 5]], ["a fast thing", EVIL, " tools for all "])
THEIRS = _result("Hugging Face", [[1, 2], [3], [4, 6]], ["a fast thing", EVIL, "tools for none"])


def _page(results: Sequence[SideResult]) -> tuple[str, Page]:
    config = SummarizeConfig(
        engine_dir=Path("engine"), test_engine=True, hf_model="model", command=f"summarize.py --dataset_path '{EVIL}'"
    )
    comparison = Comparison(config, None, "cpu", EVIL, 99, ARTICLES, [[1], [2, 2], [3]], list(results))
    text = render(comparison)
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    return text, page


@pytest.mark.parametrize("results", [[OURS, THEIRS], [OURS], [THEIRS]])
def test_the_page_is_self_contained_and_escaped(results: list[SideResult]) -> None:
    text, page = _page(results)
    assert "script" not in page.tags
    assert "b" not in page.tags[page.tags.index("article") :] or "<b>bold" not in text
    assert all(link.startswith("#") for link in page.loaded)
    assert not re.search(r"@import|url\((?!#)|<link", text)
    assert page.tags.count("article") == len(ARTICLES)
    assert page.tags.count("svg") == 2
    assert page.tags.count("details") == 1  # the long article


def test_ids_on_the_page_are_unique() -> None:
    text, _ = _page([OURS, THEIRS])
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"(?:url\(|href=\")#([^\")]+)", text)) <= set(ids)


def test_plots_follow_the_colours_of_the_page() -> None:
    text, _ = _page([OURS, THEIRS])
    plots = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert "var(--first)" in plots
    assert "var(--second)" in plots
    assert "#0102" not in plots


def test_numbers_and_differences() -> None:
    text, page = _page([OURS, THEIRS])
    assert "identical token ids for 2" in text
    assert text.count("identical ids</span>") == 2
    assert text.count("different ids</span>") == 1
    assert page.marks["differs"] == ["words in which the two summaries differ", "all", "none"]
    assert page.marks["shared"][1:] == ["a", "fast", "tools", "for", "tools", "for"]
    rouge1 = OURS.rouge["rouge1"] - THEIRS.rouge["rouge1"]
    row = re.search(r"<th>ROUGE-1</th>(.*?)</tr>", text)
    assert row
    cells = re.findall(r"<td>(.*?)</td>", row[1])
    assert cells == [f"{OURS.rouge['rouge1']:.3f}", f"{THEIRS.rouge['rouge1']:.3f}", f"{rouge1:+.3f}"]
    assert "<td>2.5</td>" in text  # five tokens in two seconds


def test_an_empty_summary_and_a_single_token_can_be_shown() -> None:
    result = _result("Engine", [[], [], []], ["", "", ""])
    result.step_ms[:] = [[], [], []]
    text, _ = _page([result])
    assert text.count(">nothing<") == 3
    assert result.ms_per_token is None
