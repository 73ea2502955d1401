"""How plugins are found, named and refused."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch

from bfpo_pl.batch import Annotations
from bfpo_pl.cli import main
from bfpo_pl.labeling import LabelingFunction
from bfpo_pl.parsing import subclasses
from bfpo_pl.plugins import PluginError, load_plugins

LABELING = '''
from bfpo_pl.batch import Label
from bfpo_pl.labeling import LabelingFunction


class {name}(LabelingFunction):
    """A labeling of a test."""

    def __call__(self, annotations):
        return Label(target=annotations["chosen_safe"])
'''


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty working directory; what a test imports is forgotten after it."""
    modules = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BFPO_PLUGINS", raising=False)
    yield
    for name in set(sys.modules) - modules:
        folder, _, rest = name.partition(".")
        if folder in ("plugins", "mine", "more", "a_package_of_a_test"):
            del sys.modules[name]
            vars(sys.modules.get(folder, sys)).pop(rest, None)
    gc.collect()  # their classes would stay among the known components


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def ours():
    """The plugins but for those that other installed packages declare."""
    return [plugin for plugin in load_plugins() if plugin.name.split(".")[0] in ("plugins", "mine", "more")]


def known():
    return {child.__name__ for child in subclasses(LabelingFunction)}


def test_no_folder_no_plugin():
    assert ours() == []


def test_folder_of_the_working_directory(tmp_path):
    path = write(tmp_path / "plugins" / "tiny_test_labeling.py", LABELING.format(name="FromTheFolder"))
    write(tmp_path / "plugins" / "_hidden_helper.py", "raise RuntimeError")
    write(tmp_path / "plugins" / "README.md")
    assert [(plugin.name, plugin.origin) for plugin in ours()] == [("plugins.tiny_test_labeling", str(path))]
    assert "FromTheFolder" in known()
    assert len(ours()) == 1  # a second time, without a second import


def test_packages_too(tmp_path):
    write(tmp_path / "plugins" / "tiny_test_package" / "__init__.py", "from .part import VALUE")
    write(tmp_path / "plugins" / "tiny_test_package" / "part.py", "VALUE = 1")
    write(tmp_path / "plugins" / "only_data" / "file.txt")
    assert [plugin.name for plugin in ours()] == ["plugins.tiny_test_package"]


def test_variable_names_folders_instead(tmp_path, monkeypatch):
    write(tmp_path / "plugins" / "left_out.py", "raise RuntimeError")
    write(tmp_path / "far" / "mine" / "second.py")
    write(tmp_path / "far" / "mine" / "first.py")
    write(tmp_path / "more" / "third.py")
    monkeypatch.setenv("BFPO_PLUGINS", os.pathsep.join([str(tmp_path / "far" / "mine"), "more"]))
    assert [plugin.name for plugin in ours()] == ["mine.first", "mine.second", "more.third"]


def test_empty_variable_means_none(tmp_path, monkeypatch):
    write(tmp_path / "plugins" / "left_out.py", "raise RuntimeError")
    monkeypatch.setenv("BFPO_PLUGINS", "")
    assert ours() == []


def test_missing_folder(monkeypatch, capsys):
    monkeypatch.setenv("BFPO_PLUGINS", "nowhere")
    with pytest.raises(PluginError, match=r"BFPO_PLUGINS names '.*nowhere', which is not a folder"):
        load_plugins()
    with pytest.raises(SystemExit) as stop:
        main(["components"])
    assert stop.value.code == 2
    assert "BFPO_PLUGINS" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("raise RuntimeError('out of cheese')", "RuntimeError: out of cheese"),
        ("import a_module_that_nobody_has", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
    ],
)
def test_a_plugin_that_raises_stops_the_run_with_its_name(tmp_path, capsys, text, cause):
    path = write(tmp_path / "plugins" / "broken_test_plugin.py", text)
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--trainer.max_steps=1"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert f"The plugin 'plugins.broken_test_plugin' ({path}) failed to import: {cause}" in message
    assert "Traceback" not in message


def test_a_plugin_hidden_by_another_module(tmp_path, monkeypatch):
    write(tmp_path / "first" / "mine" / "same.py")
    hidden = write(tmp_path / "second" / "mine" / "same.py")
    folders = [str(tmp_path / name / "mine") for name in ("first", "second")]
    monkeypatch.setenv("BFPO_PLUGINS", os.pathsep.join(folders))
    with pytest.raises(PluginError, match=r"is hidden by another module of the name 'mine\.same'") as error:
        load_plugins()
    assert str(hidden) in str(error.value)


def package(folder, text):
    """An installed package with an entry point."""
    write(folder / "a_package_of_a_test.py", text)
    info = folder / "a_package_of_a_test-1.0.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: a-package-of-a-test\nVersion: 1.0\n")
    write(info / "entry_points.txt", "[bfpo_pl.plugins]\nsome_method = a_package_of_a_test\n")
    sys.path.insert(0, str(folder))


def test_entry_point_of_an_installed_package(tmp_path):
    package(tmp_path / "site", LABELING.format(name="FromAPackage"))
    assert ("a_package_of_a_test", "a-package-of-a-test") in [(p.name, p.origin) for p in load_plugins()]
    assert "FromAPackage" in known()


def test_entry_point_that_raises(tmp_path):
    package(tmp_path / "site", "1 / 0")
    with pytest.raises(PluginError, match=r"entry point 'some_method' of a-package-of-a-test.*ZeroDivisionError"):
        load_plugins()


def test_components_lists_a_plugins_class_and_its_file(tmp_path, capsys):
    write(tmp_path / "plugins" / "listed_test_plugin.py", LABELING.format(name="ListedByComponents"))
    main(["components"])
    printed = capsys.readouterr().out
    assert "ListedByComponents" in printed
    assert "plugins.listed_test_plugin" in printed


def test_the_readmes_example_is_a_plugin(tmp_path, capsys):
    readme = (Path(__file__).parents[2] / "plugins" / "README.md").read_text()
    write(tmp_path / "plugins" / "safer_by_far.py", readme.split("```python\n")[1].split("```")[0])
    assert [plugin.name for plugin in ours()] == ["plugins.safer_by_far"]
    labeling = vars(sys.modules["plugins.safer_by_far"])["SaferByFar"](gap=0.3)
    flags = {"chosen_safe": torch.tensor([0.9, 0.0, 0.4]), "rejected_safe": torch.tensor([0.1, 1.0, 0.5])}
    label = labeling(Annotations.of_pairs(**flags))
    assert label.target.tolist() == [0.5, -0.5, -0.5]
    assert label.weight.tolist() == [1, 1, 0]
