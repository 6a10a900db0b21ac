import pytest
import yaml

from bench.api import run
from bench.suite import SamplerSpec, StudentSpec, load_suite, suite_names
from samplers.registry import SAMPLERS

BASE = {
    "name": "tiny",
    "model": "gmm",
    "nfe": [4, 2],
    "num_samples": 20,
    "samplers": ["ddim", {"sampler": "euler", "label": "euler-vp", "options": {"variable": "t"}}],
    "teacher": {"sampler": "heun", "nfe": 10},
}


def write(tmp_path, **changes):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**BASE, **changes}))
    return str(path)


def test_every_shipped_suite_loads():
    assert {"gmm", "mnist"} <= set(suite_names())
    for name in suite_names():
        assert load_suite(name).name == name


def test_default_suite_is_the_six_samplers_at_four_budgets():
    suite = load_suite("mnist")
    assert [spec.label for spec in suite.samplers] == ["ddpm", "ddim", "euler-vp", "heun", "dpm-solver-3s", "dpmpp-2m"]
    assert suite.nfe == (4, 8, 16)
    assert suite.num_samples >= 500


def test_a_file_is_read_and_budgets_are_sorted(tmp_path):
    suite = load_suite(write(tmp_path))
    assert suite.nfe == (2, 4)
    assert [spec.label for spec in suite.samplers] == ["ddim", "euler-vp"]
    assert suite.samplers[1].options == {"variable": "t"}


def test_a_row_with_lists_is_a_row_for_each_combination(tmp_path):
    rows = [
        {"sampler": "heun", "grid": ["edm", "logsnr"]},
        {"sampler": ["dpmpp-2m", "unipc-3"], "grid": ["uniform", None], "afs": True},
        {"sampler": "ddim", "label": "mine", "model": ["gmm", "runs/a/model"], "options": {"eta": 0.5}},
    ]
    suite = load_suite(write(tmp_path, samplers=rows))
    found = [(spec.label, spec.sampler, spec.grid, spec.model, spec.afs) for spec in suite.samplers]
    assert found == [
        ("heun edm", "heun", "edm", None, False),
        ("heun logsnr", "heun", "logsnr", None, False),
        ("dpmpp-2m uniform", "dpmpp-2m", "uniform", None, True),
        ("dpmpp-2m grid none", "dpmpp-2m", None, None, True),
        ("unipc-3 uniform", "unipc-3", "uniform", None, True),
        ("unipc-3 grid none", "unipc-3", None, None, True),
        ("mine gmm", "ddim", None, "gmm", False),
        ("mine runs-a-model", "ddim", None, "runs/a/model", False),
    ]
    assert [spec.options for spec in suite.samplers[-2:]] == [{"eta": 0.5}] * 2
    assert suite.changed(nfe=[3]).samplers == suite.samplers


def test_a_list_of_models_is_a_suite_for_each(tmp_path):
    suite = load_suite(write(tmp_path, model=["gmm", "runs/x/model"]))
    assert {name: one.model for name, one in suite.of_each_model().items()} == {
        "gmm": "gmm",
        "runs-x-model": "runs/x/model",
    }
    assert [one.models for one in suite.of_each_model().values()] == [(), ()]
    assert suite.changed(nfe=[3]).models == suite.models
    assert set(suite.changed(model="gmm-3").of_each_model()) == {""}
    assert load_suite(write(tmp_path)).of_each_model() == {"": load_suite(write(tmp_path))}


def test_the_exact_suite_has_every_deterministic_sampler():
    have = {spec.sampler for spec in load_suite("gmm").samplers}
    assert have >= {name for name, sampler in SAMPLERS.items() if sampler.stochastic == "no"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nfes": [3]}, r"tiny\.yaml, line \d+: nfes: no such field; did you mean 'nfe'"),
        ({"nfe": []}, r"tiny\.yaml, line 3: nfe: "),
        ({"nfe": [0]}, "nfe: must be at least 1, got 0"),
        (
            {"samplers": [{"student": "runs/x", "guidence": 2}]},
            r"samplers\.0\.guidence: no such field; did you mean 'guidance'",
        ),
        ({"samplers": [{"student": ""}]}, r"samplers\.0\.student: .* at least 1 character"),
        (
            {"samplers": [{"student": "runs/ddim"}, {"student": "a", "label": "ddim"}]},
            "label 'ddim' stands for two rows",
        ),
        ({"num_samples": 1}, "num_samples"),
        (
            {"samplers": [{"sampler": "heun", "grid": []}]},
            r"line \d+: samplers.0: grid must be a value or a list",
        ),
        ({"samplers": [{"sampler": "heun", "grid": ["edm", "edmm"]}]}, r"samplers\.0\.grid: unknown grid 'edmm'"),
        ({"model": ["gmm", "gmm"]}, "model must be a name or a list of different ones"),
        ({"num_samples": "many"}, "num_samples"),
        ({"samplers": ["dimd"]}, "unknown sampler 'dimd'; did you mean 'ddim'"),
        ({"samplers": [{"sampler": "ddim", "options": {"etta": 1}}]}, "unknown option .* 'etta'; did you mean 'eta'"),
        (
            {"samplers": [{"sampler": "ddim", "options": {"eta": "foo"}}]},
            r"line \d+: samplers\.0: eta of sampler 'ddim' must be like its default 0\.0, got 'foo'",
        ),
        ({"samplers": ["ddim", "heun", "ddim"]}, r"line \d+: samplers: label 'ddim' stands for two rows, 1 and 3"),
        ({"samplers": [{"sampler": "unipc-2", "options": {"variant": "bh3"}}]}, r"samplers\.0: unknown variant 'bh3'"),
        ({"nfe": 4}, "line 3: nfe: must be a list, got 4"),
        ({"judge": {"extractor": "pixels"}}, r"judge\.reference: Field required"),
        (
            {"judge": {"extractor": "pixels", "refernce": "x"}},
            r"judge\.refernce: no such field; did you mean 'reference'",
        ),
        ({"teacher": {"sampler": "heun"}}, "teacher.nfe"),
    ],
)
def test_a_bad_file_names_file_and_field(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        load_suite(write(tmp_path, **changes))


def test_a_row_may_be_a_student(tmp_path):
    row = {"student": "runs/x/students", "label": "progressive", "guidance": 2.0}
    suite = load_suite(write(tmp_path, samplers=["ddim", row, {"student": "runs/y/students"}]))
    assert suite.samplers[1] == StudentSpec(**row)
    assert [spec.label for spec in suite.samplers] == ["ddim", "progressive", "y"]
    assert not any(spec.untrained for spec in suite.samplers[1:])


def test_students_are_added_before_the_chosen_rows(tmp_path):
    suite, added = load_suite(write(tmp_path)), StudentSpec(student="runs/x", label="mine")
    assert [spec.label for spec in suite.changed((), [added]).samplers] == ["mine", "ddim", "euler-vp"]
    assert [spec.label for spec in suite.changed(["euler-vp"], [added]).samplers] == ["mine", "euler-vp"]
    assert [spec.label for spec in suite.changed(["mine"], [added]).samplers] == ["mine"]
    with pytest.raises(ValueError, match="label 'ddim' of a student is also that of a sampler"):
        suite.changed((), [StudentSpec(student="runs/x", label="ddim")])


def test_not_yaml_and_unknown_names(tmp_path):
    path = tmp_path / "broken.yaml"
    path.write_text("a: [1")
    with pytest.raises(ValueError, match=r'(?s)is not YAML: .*in ".*broken\.yaml", line 1'):
        load_suite(str(path))
    with pytest.raises(ValueError, match="unknown suite 'mnits'; did you mean 'mnist'"):
        load_suite("mnits")
    for name in ("none.yaml", str(tmp_path / "folder.yaml")):
        (tmp_path / "folder.yaml").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match="there is no suite file .*yaml"):
            load_suite(name)


@pytest.mark.parametrize("label", ["../up", "/root", "a/../../b", "..\\up"])
@pytest.mark.parametrize("spec", [{"sampler": "ddim"}, {"student": "mnist-sfd"}])
def test_a_label_does_not_lead_out_of_the_results(label, spec):
    with pytest.raises(ValueError, match="must not lead out of it"):
        (StudentSpec if "student" in spec else SamplerSpec)(**spec, label=label)


def test_changed_selects_rows_by_label_or_registered_name(tmp_path):
    suite = load_suite(write(tmp_path)).changed(["euler-vp", "dpmpp-2m", "euler-vp"], nfe=[7], num_samples=None)
    assert [(spec.label, spec.sampler) for spec in suite.samplers] == [("euler-vp", "euler"), ("dpmpp-2m", "dpmpp-2m")]
    assert suite.nfe == (7,)
    assert suite.num_samples == 20
    with pytest.raises(ValueError, match="unknown sampler 'huen'; did you mean 'heun'"):
        suite.changed(["huen"])
    with pytest.raises(ValueError, match="suite 'tiny': num_samples"):
        suite.changed(num_samples=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "gmmm"}, r"tiny\.yaml, line \d+: model: unknown model 'gmmm'; did you mean 'gmm'"),
        ({"judge": "there/is/none"}, r"tiny\.yaml, line \d+: judge: judge is for a model of images"),
        (
            {"samplers": [{"student": "there/is/none"}]},
            r"tiny\.yaml, line \d+: samplers: student 'none': there is no folder",
        ),
        (
            {"samplers": ["ddim", {"sampler": "heun", "model": "gmm-3"}]},
            r"line \d+: samplers: model 'gmm-3': .*shape \(3,\)",
        ),
        ({"metrics": ["inception_score"]}, r"tiny\.yaml, line \d+: metrics: metric 'inception_score' needs class"),
        ({"guidance": 2.0}, r"tiny\.yaml, line \d+: guidance: guidance=2 is given, but no network"),
    ],
)
def test_what_a_file_asks_for_and_cannot_be_had_names_its_line(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(write(tmp_path, **changes), out=tmp_path / "out", quiet=True)


def test_what_the_caller_asks_for_instead_names_no_line(tmp_path):
    for changes, message in (({"model": "gmmm"}, "^unknown model"), ({"metrics": ["inception_score"]}, "^metric")):
        with pytest.raises(ValueError, match=message):
            run(write(tmp_path), out=tmp_path / "out", quiet=True, **changes)
