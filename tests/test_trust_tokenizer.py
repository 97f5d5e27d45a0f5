"""What a tokenizer's files may say. Run: pytest tests/test_trust_tokenizer.py."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from click.testing import CliRunner
from families import KINDS
from hypothesis import given
from hypothesis import strategies as st

from phi3_mlflow.builders.transformers import save_model
from phi3_mlflow.cli import cli
from phi3_mlflow.runtime import loading, trust
from phi3_mlflow.runtime.errors import WeightsError
from phi3_mlflow.runtime.layouts import Layouts, finder
from phi3_mlflow.runtime.tokens import Tokens
from phi3_mlflow.runtime.trust.tokenizer_json import _REGEXES

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def embedded(tmp_path):
    """The embedded model's tokenizer, of Phi-3's kind."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in NAMES:
        shutil.copyfile(ROOT / "artifacts" / "onnx" / name, folder / name)
    return folder


@pytest.fixture
def byte_level(tmp_path):
    """A tokenizer like Llama 3's."""
    folder = tmp_path / "byte-level"
    folder.mkdir()
    KINDS["Llama 3"].write(folder)
    return folder


def change(folder, path, value, name="tokenizer.json"):
    """Puts a value at a place of slashes, or takes it away with `...`."""
    content = json.loads((folder / name).read_text("utf-8"))
    *where, last = path.split("/")
    parent = content
    for key in where:
        parent = parent[int(key) if isinstance(parent, list) else key]
    last = int(last) if isinstance(parent, list) else last
    if value is ...:
        del parent[last]
    else:
        parent[last] = value
    (folder / name).write_text(json.dumps(content), "utf-8")


@pytest.mark.parametrize("name", KINDS)
def test_the_tokenizers_of_the_families_are_taken_as_they_are_and_as_transformers_saves_them(tmp_path, name):
    import transformers

    for folder in ("original", "saved"):
        (tmp_path / folder).mkdir()
    KINDS[name].write(tmp_path / "original")
    trust.check_tokenizer(tmp_path / "original")
    (tmp_path / "original" / "config.json").write_text(json.dumps({"model_type": KINDS[name].model_type}))
    transformers.AutoTokenizer.from_pretrained(tmp_path / "original").save_pretrained(tmp_path / "saved")
    trust.check_tokenizer(tmp_path / "saved")


ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
MULTIPLY = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}
SPLIT = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
PAD = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
CUT = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 5}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("normalizer", {"type": "Sequence", "normalizers": [MULTIPLY] * 6}, "normalizer.normalizers[0].pattern.String"),
        ("normalizer", {"type": "Precompiled", "precompiled_charsmap": "BAAAAAEAAAA="}, "type 'Precompiled'"),
        ("normalizer", {"type": "Lowercase"}, "type 'Lowercase': it must be 'NFC' or 'Prepend' or 'Replace'"),
        ("normalizer", {"type": "NFC"}, "normalizer NFC, which does not go with BPE with byte fallback"),
        ("normalizer", {"type": "Prepend", "prepend": "a" * 10**5}, "normalizer.prepend 'aaaa"),
        ("pre_tokenizer", SPLIT, "pre_tokenizer.pattern.Regex '(a+)+$': it must be exactly the published expression"),
        ("pre_tokenizer", {"type": "Whitespace"}, "pre_tokenizer.type 'Whitespace'"),
        ("post_processor/single", [{"Sequence": {"id": "A", "type_id": 0}}] * 2, "it must be added tokens, and the"),
        ("post_processor/single", [], "post_processor.single []"),
        ("post_processor/special_tokens/<s>/ids", [2**20 - 1], "ids [1048575]: it must be the id of that added token"),
        ("post_processor/special_tokens/<s>/ids", [2**32], "ids[0] 4294967296: it must be an integer from 0"),
        ("decoder", None, "no decoder"),
        ("decoder/decoders/1", {"type": "WordPiece", "prefix": "##", "cleanup": True}, "decoder.decoders[1].type"),
        ("decoder/decoders/1", ..., "decoder Replace Fuse Strip: it is neither BPE with byte fallback, as Phi-3's nor"),
        ("decoder/decoders/3/start", 2, "decoder.decoders[3].start 2: it must be an integer from 0 to 1"),
        ("added_tokens/0/single_word", True, "added_tokens[0].single_word True: it must be false"),
        ("added_tokens/0/special", "yes", "added_tokens[0].special 'yes': it must be true or false"),
        ("added_tokens/0/special", ..., "no added_tokens[0].special"),
        ("added_tokens/0/id", -1, "added_tokens[0].id -1"),
        ("added_tokens/3/id", 2**20, "added_tokens[3].id 1048576: it must be an integer from 0 to 1048575"),
        ("added_tokens/3/id", 3000, "added_tokens[3].id 3000 for '<|endoftext|>': it must be 2048"),
        ("added_tokens/3/content", "", "added_tokens[3].content ''"),
        ("added_tokens/3/content", "<s>", "added_tokens[3].content '<s>' twice"),
        ("added_tokens/3/content", "x" * 201, "it must be text of 1 to 200 characters"),
        ("added_tokens/3/further", 1, "the key added_tokens[3].further, which no tokenizer here needs"),
        ("added_tokens", ..., "no added_tokens"),
        ("model", ..., "no model.type"),
        ("model", [], "model []: it must be an object"),
        ("model/type", "Unigram", "model.type 'Unigram': it must be 'BPE'"),
        ("model/dropout", 0.5, "model.dropout 0.5: it must be null or 0: any other makes tokens random"),
        ("model/dropout", False, "model.dropout False"),
        ("model/unk_token", "<nothing>", "model.unk_token '<nothing>': it must be in model.vocab"),
        ("model/continuing_subword_prefix", "longer than any", "model.continuing_subword_prefix 'longer than any'"),
        ("model/byte_fallback", 1, "model.byte_fallback 1: it must be true or false"),
        ("model/vocab", ..., "no model.vocab"),
        ("model/vocab", {}, "0 entries in model.vocab"),
        ("model/vocab/zz", 10**40, "'zz' 1000000000"),
        ("model/vocab/zz", 5, "'zz' in model.vocab, both with the id 5"),
        ("model/vocab/zz", True, "'zz' True in model.vocab"),
        ("model/vocab/" + "z" * 1001, 2047, "it must be text of 1 to 1000 characters"),
        ("model/vocab/\ud800", 2100, "half of a surrogate pair"),
        ("model/merges", {}, "model.merges {}: it must be a list of pairs"),
        ("model/merges/7", "a b c", "model.merges[7] 'a b c': it must be a list of two tokens"),
        ("model/merges/7", ["a", ["b"]], "model.merges[7] ['a', ['b']]: it must be a list of two tokens"),
        ("model/merges/7", ["zzz", "qqq"], "model.merges[7] ['zzz', 'qqq']: both and what they make must be in"),
        ("model/further", 1, "the key model.further, which no tokenizer here needs"),
        ("padding", {**PAD, "pad_token": "<s>"}, "padding.strategy.Fixed 1000000000"),
        ("truncation", CUT, "truncation.stride 5: it must be below max_length"),
        ("version", "2.0", "version '2.0': it must be '1.0'"),
    ],
)  # fmt: skip
def test_what_no_tokenizer_needs_is_refused_by_name(embedded, path, value, message):
    change(embedded, path, value)
    with pytest.raises(WeightsError, match=re.escape(message)) as refusal:
        trust.check_tokenizer(embedded)
    assert str(refusal.value).startswith(f"{embedded / 'tokenizer.json'} has ")
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("pre_tokenizer/pretokenizers/0", SPLIT, "pre_tokenizer.pretokenizers[0].pattern.Regex '(a+)+$'"),
        ("pre_tokenizer/pretokenizers/0/behavior", "Removed", "behavior 'Removed' with invert False: that loses text"),
        ("pre_tokenizer/pretokenizers/1/add_prefix_space", True, "pretokenizers[1].add_prefix_space True"),
        ("pre_tokenizer/pretokenizers/1/trim_offsets", ..., "no pre_tokenizer.pretokenizers[1].trim_offsets"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [{"type": "Sequence"}]}, "[0].type 'Sequence'"),
        ("pre_tokenizer", None, "pre_tokenizer null, which does not go with byte-level BPE"),
        ("normalizer", {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}, "normalizer Replace"),
        ("post_processor/processors/0", {"type": "BertProcessing", "sep": ["a", 1]}, "processors[0].type"),
    ],
)  # fmt: skip
def test_what_no_byte_level_tokenizer_needs_is_refused_by_name(byte_level, path, value, message):
    change(byte_level, path, value)
    with pytest.raises(WeightsError, match=re.escape(message)):
        trust.check_tokenizer(byte_level)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (
            "tokenizer_class",
            "AutoModelForCausalLM",
            "tokenizer_class 'AutoModelForCausalLM': it must be TokenizersBack",
        ),
        ("tokenizer_class", "MyTokenizer", "tokenizer_class 'MyTokenizer'"),
        ("auto_map", {"AutoTokenizer": ["code.Tokenizer"]}, "auto_map.AutoTokenizer ['code.Tokenizer']: it must be a"),
        ("auto_map", ["code.Tokenizer", None], "auto_map ['code.Tokenizer', None]: it must be an object"),
        ("fast_tokenizer_files", ["tokenizer.4.0.json"], "the key fast_tokenizer_files"),
        ("gguf_file", "other.gguf", "the key gguf_file"),
        ("tokenizer_object", {}, "the key tokenizer_object"),
        ("trust_remote_code", True, "trust_remote_code True"),
        ("chat_template", [{"name": "default"}], "no chat_template[0].template"),
        ("chat_template", 5, "chat_template 5"),
        ("bos_token", {"special": True}, "no bos_token.content"),
        ("added_tokens_decoder", [], "added_tokens_decoder []: it must be an object"),
        ("added_tokens_decoder/x", {"content": "<x>"}, "the key added_tokens_decoder.x: it must be an id"),
        ("added_tokens_decoder/2048/content", "<s>", "'<s>' as token 2048, and tokenizer.json has it as 1"),
        ("added_tokens_decoder/9", {"content": "<x>"}, "'<x>' as token 9, and tokenizer.json has no such added token"),
        ("model_max_length", "many", "model_max_length 'many'"),
        ("bos_token", "x" * 201, "it must be null or text of 1 to 200 characters or an object"),
        ("added_tokens_decoder/2048/content", "x" * 201, "it must be text of 1 to 200 characters"),
        (
            "additional_special_tokens",
            [f"{number:0128}" for number in range(2049)],
            "tokenizer_config.json has added tokens of 262",
        ),
        (
            "extra_special_tokens",
            {f"x{number}": {"content": f"{number:0128}"} for number in range(2049)},
            "tokenizer_config.json has added tokens of 262",
        ),
    ],
)
def test_what_transformers_would_follow_is_refused(embedded, path, value, message):
    change(embedded, path, value, "tokenizer_config.json")
    with pytest.raises(WeightsError, match=re.escape(message)):
        trust.check_tokenizer(embedded)


def added(folder, words):
    """Adds so many tokens to tokenizer.json."""
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    first = 1 + max(token["id"] for token in content["added_tokens"])
    content["added_tokens"] += [{"id": first + i, "content": word, **ADDED} for i, word in enumerate(words)]
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")


def within(seconds, program, *arguments):
    """Runs a program in another process, with a watchdog."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    subprocess.run(command, check=True, env=environment, timeout=seconds)


LOAD = """
import sys, pathlib
from phi3_mlflow.runtime import trust
from phi3_mlflow.runtime.tokens import Tokens
folder = pathlib.Path(sys.argv[1])
trust.check_tokenizer(folder)
Tokens.from_folder(folder, template=False)
"""


def test_added_tokens_are_refused_where_they_are_longer_together_than_any_tokenizers(embedded):
    path = embedded / "tokenizer.json"
    before = sum(len(token["content"]) for token in json.loads(path.read_text("utf-8"))["added_tokens"])
    words = [f"{number:0128}" for number in range(2046)]
    added(embedded, [*words, "x" * (256 - before)])
    trust.check_tokenizer(embedded)
    added(embedded, ["y"])
    with pytest.raises(WeightsError, match="added tokens of 262145 characters together: they must be at most 262144;"):
        trust.check_tokenizer(embedded)


def test_a_merge_of_endless_parts_is_not_taken_apart(embedded):
    change(embedded, "model/merges/7", " " * 30_000_000)
    tracemalloc.start()
    with pytest.raises(WeightsError, match=r"has model\.merges\[7\] '   .*it must be a list of two tokens"):
        trust.check_tokenizer(embedded)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000_000  # some copies of the file; a list of all parts takes 240 MB more


@pytest.mark.parametrize("kind", ["letters", "spaces"])
def test_as_many_added_tokens_as_there_may_be_are_read_in_time(byte_level, kind):
    """It took the square of their number."""
    letters = ("abcdefgh", " \t\u2002\u2003\u2004\u2005\u2006\u2007")[kind == "spaces"]
    words = ("".join(word) for word in itertools.product(letters, repeat=8))
    added(byte_level, [word for word, _ in zip(words, range(32_700), strict=False)])
    within(60, LOAD, byte_level)


def test_a_template_full_of_what_tokens_begin_with_is_read_in_time(embedded):
    """It took the product of its length and theirs."""
    added(embedded, ["a" * 190 + f"{number:04}" for number in range(1300)])
    template = json.loads((embedded / "tokenizer_config.json").read_text("utf-8"))["chat_template"]
    change(embedded, "chat_template", template + "{#" + "-" * 100 + "#}" + "a" * 60_000, "tokenizer_config.json")
    within(60, LOAD, embedded)


@given(
    names=st.sets(st.text("ab<> \u00fc\U0001f999", min_size=1, max_size=4), max_size=6),
    text=st.text("ab<> \u00fc\U0001f999\n", max_size=30),
)
def test_control_tokens_are_found_as_an_expression_of_all_of_them_finds_them(names, text):
    control = {name: number for number, name in enumerate(sorted(names))}
    layouts = Layouts.__new__(Layouts)
    layouts._control, layouts._names = control, finder(control)
    expression = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or "(?!)"
    expected = [control.get(part, part) for part in re.split(f"({expression})", text) if part]
    assert list(layouts._text(text)) == expected


def test_a_token_of_a_name_that_a_file_has_for_its_keys_is_only_a_token(embedded):
    path = embedded / "added_tokens.json"
    for name in ("added_tokens_decoder", "additional_special_tokens"):
        path.write_text(json.dumps({name: 7}))
        with pytest.raises(WeightsError, match=f"has '{name}' as token 7, and tokenizer.json has no such added token"):
            trust.check_tokenizer(embedded)


def test_the_older_files_beside_it_are_checked_too(embedded):
    (embedded / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "tokenizer_file": "/etc/passwd"}))
    with pytest.raises(WeightsError, match=r"special_tokens_map\.json has the key tokenizer_file"):
        trust.check_tokenizer(embedded)
    (embedded / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    (embedded / "added_tokens.json").write_text(json.dumps({"<|end|>": 7}))
    with pytest.raises(WeightsError, match=r"'<\|end\|>' as token 7, and tokenizer\.json has it as 2055"):
        trust.check_tokenizer(embedded)


def test_what_fine_tuned_tokenizers_have_is_taken_and_changes_nothing(embedded):
    prompt = Tokens.from_folder(embedded).encode_text("one two three four")
    change(embedded, "truncation", {**CUT, "max_length": 2, "stride": 1})
    change(embedded, "padding", {**PAD, "strategy": {"Fixed": 4096}, "pad_token": "<|endoftext|>"})
    change(embedded, "model_max_length", 1e30, "tokenizer_config.json")
    trust.check_tokenizer(embedded)
    assert Tokens.from_folder(embedded).encode_text("one two three four") == prompt


@pytest.mark.parametrize("digits", [False, True])
@pytest.mark.parametrize("name", _REGEXES)
def test_the_published_expressions_come_to_an_end_on_any_text(byte_level, name, digits):
    change(byte_level, "pre_tokenizer/pretokenizers/0/pattern/Regex", _REGEXES[name])
    if digits:  # as SmolLM
        content = json.loads((byte_level / "tokenizer.json").read_text("utf-8"))
        content["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})
        (byte_level / "tokenizer.json").write_text(json.dumps(content))
    trust.check_tokenizer(byte_level)
    ours = Tokens.from_folder(byte_level)
    for text in (" ", "\n", " \n", "a", "A", "Aa", "1", "!", "'s", "\u4e2d", "\u0301", "\r", "\t "):
        long = text * (50_000 // len(text)) + "x"
        assert ours.decode(ours.encode_text(long, bos=False)) == long


def test_ids_beyond_the_model_are_refused(tmp_path):
    folder = shutil.copytree(ROOT / "artifacts" / "onnx", tmp_path / "onnx")
    content = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    content["added_tokens"] += [{"id": 2059 + each, "content": f"<{each}>", **ADDED} for each in range(53)]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    trust.check(folder)  # 2112 are the model's
    content["added_tokens"].append({"id": 2112, "content": "<one more>", **ADDED})
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(WeightsError, match="has ids up to 2112, and the model has 2112 tokens"):
        loading.load(folder)


@pytest.mark.parametrize("builder", ["onnx", "transformers"])
def test_both_builders_refuse_it_in_one_line(tmp_path, builder):
    folder = shutil.copytree(ROOT / "artifacts" / builder, tmp_path / "weights")
    change(folder, "normalizer/normalizers/0", MULTIPLY)
    result = CliRunner().invoke(cli, ["log", builder, "--weights", str(folder)])
    assert result.exit_code == 1
    (line,) = result.output.splitlines()
    assert "tokenizer.json has normalizer.normalizers[0].pattern.String 'a': it must be ' '" in line


def test_the_tokenizer_of_a_pipeline_in_memory_is_checked(tmp_path):
    import transformers

    pipeline = transformers.pipeline("text-generation", model=str(ROOT / "artifacts" / "transformers"))
    from tokenizers import normalizers

    pipeline.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(WeightsError, match=r"normalizer\.type 'Lowercase'"):
        save_model(tmp_path / "model", pipeline)
    assert not (tmp_path / "model").exists()


def test_tokenizers_changed_at_random_are_refused_or_work():
    """Each within seconds, and in another process, which a library may end."""
    command = [sys.executable, str(ROOT / "tests" / "tokenizer_fuzz.py"), "0", "600"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert result.returncode == 0, f"{result.stdout[-10:]} {result.stderr[-2000:]}"
    taken = int(result.stdout.splitlines()[-1].split()[0])
    assert 20 < taken < 500
