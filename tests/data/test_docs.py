"""docs/data.md: its configs parse, its plugin works, and what it lists is what there is."""

import re
from pathlib import Path

import pytest
import yaml

from bfpo_pl.component import UserError
from bfpo_pl.data import Adapter, AlignmentData, Source
from bfpo_pl.data.rows import RowError
from bfpo_pl.listing import subclasses
from bfpo_pl.module import PreferenceModule
from bfpo_pl.parsing import BFPOCLI
from bfpo_pl.plugins import load_plugins
from bfpo_pl.sft import SFTModule

REPOSITORY = Path(__file__).parent.parent.parent
TEXT = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def snippets(key):
    """The snippets of a stream's source or adapter in the tables."""
    return [yaml.safe_load(found)[key] for found in re.findall(rf"^\|[^|]*\| `({key}: [^`]*)` \|", TEXT, re.MULTILINE)]


class Instantiated(BFPOCLI):
    """Instantiates what the command line names; runs nothing and asks no Hub."""

    def after_instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


def parsed(runs, *args, sft=False):
    configs = ["configs/sft.yaml"] if sft else ["configs/base.yaml", "configs/experiment/bfpo.yaml"]
    stacked = [part for config in configs for part in ("-c", config)]
    arguments = ["fit", *stacked, *args, f"--runs={runs}", "--trainer.accelerator=cpu"]
    return Instantiated(SFTModule if sft else PreferenceModule, AlignmentData, arguments, load_plugins(), "fit")


def assert_holds(got, wanted, key=""):
    """Every value of a config is in the resolved config; a class may be given by its short name alone."""
    if isinstance(got, dict) and "class_path" in got:
        wanted = {"class_path": wanted} if isinstance(wanted, str) else wanted
        assert got["class_path"].rpartition(".")[2] == wanted["class_path"], key
        got, wanted = got.get("init_args", {}), wanted.get("init_args", {})
    if not isinstance(wanted, dict):
        assert got == wanted, key
        return
    for name, value in wanted.items():
        assert_holds(got[name], value, f"{key}.{name}")


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """The folder with the plugin of the document."""
    [code] = blocks("python")
    folder = tmp_path_factory.mktemp("documented") / "documented_plugins"
    folder.mkdir()
    (folder / re.match(r"# plugins/(\w+\.py)\n", code)[1]).write_text(code, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def with_plugin(plugin, monkeypatch, in_repository):
    monkeypatch.setenv("BFPO_PLUGINS", str(plugin))
    monkeypatch.syspath_prepend(str(plugin.parent))


@pytest.mark.parametrize("text", blocks("yaml"))
def test_a_config_parses_to_what_it_says(text, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(text, encoding="utf-8")
    run = parsed(tmp_path / "runs", "-c", str(config), sft=text.startswith("# bfpo sft\n"))
    wanted = yaml.safe_load(text)
    assert_holds(run.record, wanted)
    streams = wanted["data"].get("streams")
    assert streams is None or set(run.datamodule.streams) == set(streams)


def test_the_snippets_of_the_tables_parse_and_name_every_class(tmp_path):
    sources, adapters = snippets("source"), snippets("adapter")
    streams = {f"source{n}": {"source": found, "adapter": "Columns"} for n, found in enumerate(sources)}
    plain = {"class_path": "LocalFiles", "init_args": {"path": "rows.jsonl"}}
    streams |= {f"adapter{n}": {"source": plain, "adapter": found} for n, found in enumerate(adapters)}
    wanted = {"data": {"streams": {name: {**stream, "batch_size": 1} for name, stream in streams.items()}}}
    wanted["data"]["driver"] = "source0"
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(wanted), encoding="utf-8")
    run = parsed(tmp_path / "runs", "-c", str(config))
    assert_holds(run.record, wanted)
    named = {
        type(part).__name__ for stream in run.datamodule.streams.values() for part in (stream.source, stream.adapter)
    }
    ours = [kind for base in (Source, Adapter) for kind in subclasses(base) if kind.__module__.startswith("bfpo_pl.")]
    assert named == {kind.__name__ for kind in ours}


def test_the_plugin_reads_rows(tmp_path):
    [text] = [text for text in blocks("yaml") if "RatedAnswers" in text]
    config = tmp_path / "config.yaml"
    config.write_text(text, encoding="utf-8")
    adapter = parsed(tmp_path / "runs", "-c", str(config)).datamodule.streams["rated"].adapter
    raw = {"question": "Why?", "answers": ["Because.", "Ask her."], "ratings": [2, 4.5], "harm": [0.25, 1]}
    row = adapter(raw, "rated.jsonl:1")
    assert row.prompt[0].content == "Why?"
    assert row.responses == ("Ask her.", "Because.")
    assert row.pairs == ((0, 1),)
    assert row.columns == {"safe": (0.0, 0.75)}
    assert row.pair_columns == {"margin": (2.5,)}
    for change, field in (
        ({"ratings": [4, 4.25]}, "ratings"),
        ({"answers": ["Because."]}, "answers"),
        ({"harm": ["no", "yes"]}, "harm"),
    ):
        with pytest.raises(RowError, match=rf"rated.jsonl:2: {field} = "):
            adapter({**raw, **change}, "rated.jsonl:2")
    with pytest.raises(UserError, match="least_gap"):
        type(adapter)(least_gap=-1)


def test_the_counts_that_it_lists_are_those_of_data_json(tmp_path):
    small = ["--data.streams.safety.source.count=40", "--data.streams.helpfulness.source.count=40"]
    run = parsed(tmp_path / "runs", *small)
    run.datamodule.tokenizer = run.model.tokenizer
    run.datamodule.setup("fit")
    counts = {name for splits in run.datamodule.report.values() for summary in splits.values() for name in summary}
    [listed] = re.findall(r"^Counts land in (.*?)\n\n", TEXT, re.DOTALL | re.MULTILINE)
    assert len(counts) > 10
    assert counts <= set(re.findall(r"`(\w+)`", listed))


def test_what_it_points_at_is_there():
    files = set(re.findall(r"`((?:configs|plugins)/[\w/.]*)`", TEXT)) - {"plugins/"}
    assert {"configs/data/paper_bfpo.yaml", "plugins/kto/"} <= files
    assert [name for name in files if not (REPOSITORY / name).exists()] == []
    headings = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^##+ (.*)$", TEXT, re.MULTILINE)
    }
    links = set(re.findall(r"\]\(#([\w-]+)\)", TEXT))
    assert len(links) > 10
    assert links <= headings
