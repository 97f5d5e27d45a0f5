"""What a folder of weights may hold. Run: pytest tests/test_trust.py."""

import json
import os
import pickle
import re
import shutil
import struct
import time
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import protobuf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from protobuf import attention, entries, field, graph, model, node, tensor

from phi3_mlflow.runtime import trust
from phi3_mlflow.runtime.errors import WeightsError
from phi3_mlflow.runtime.trust import files, genai_config, onnx_graph

ARTIFACTS = Path(__file__).resolve().parent.parent / "artifacts"


class Calls:
    """What a pickle of it calls."""

    def __reduce__(self):
        return os.getpid, ()


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    return shutil.copytree(ARTIFACTS / "onnx", tmp_path / "onnx")


@pytest.fixture
def transformers(tmp_path: Path) -> Path:
    """The weights of a logged transformers model."""
    source = ARTIFACTS / "transformers"
    for part in ("model", "components/tokenizer"):
        (tmp_path / part).mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(source / name, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path / "components" / "tokenizer")
    return tmp_path


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def configured(folder: Path, path: str, value: object) -> Path:
    """Sets one key of genai_config.json, by its dotted path."""
    content = json.loads((folder / "genai_config.json").read_text())
    *names, last = path.split("/")
    place = content
    for name in names:
        place = place.setdefault(name, {})
    place[last] = value
    (folder / "genai_config.json").write_text(json.dumps(content))
    return folder


class TestFiles:
    @pytest.mark.parametrize(
        ("start", "kind"),
        [
            (b"\x7fELF\x02\x01\x01", "native library (ELF)"),
            (b"\xcf\xfa\xed\xfe", "native library (Mach-O)"),
            (b"\xfe\xed\xfa\xce", "native library (Mach-O)"),
            (b"\xca\xfe\xba\xbe\0\0\0\2", "native library (Mach-O)"),
            (b"MZ" + bytes(58) + struct.pack("<I", 128) + bytes(64) + b"PE\0\0", "native library (PE)"),
            (b"\x80\x04\x95\x0b\0\0\0", "pickle"),
            (b"\x80\x02}q\0.", "pickle"),
            (b"\x80\x02\x8a\nl\xfcF\x9c", "pickle"),
        ],
    )
    def test_what_could_be_loaded_as_code_is_refused_by_its_first_bytes(self, onnx, start, kind):
        (onnx / "LICENSE").write_bytes(start + b"more")
        with pytest.raises(WeightsError, match=rf"LICENSE is a {re.escape(kind)}"):
            trust.check(onnx)

    def test_a_zip_archive_is_refused_as_torch_pickles_into_one(self, onnx):
        with zipfile.ZipFile(onnx / "pytorch_model.bin", "w") as archive:
            archive.writestr("data.pkl", b"\x80\x02.")
        with pytest.raises(WeightsError, match=r"pytorch_model\.bin is a zip archive"):
            trust.check(onnx)

    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_real_pickles_are_noticed(self, tmp_path, protocol):
        for value in ({}, [1], "text", (1, 2), Path("x"), {"a": [b"c"]}, 1.5, None, Calls(), [Calls()] * 3):
            (tmp_path / "file").write_bytes(pickle.dumps(value, protocol))
            with pytest.raises(WeightsError, match="is a pickle"):
                files.needed(tmp_path / "file")

    @pytest.mark.parametrize(
        "start",
        [
            b"cos\nsystem\n(S'id'\ntR.",
            b"(S'id'\nios\nsystem\n.",
            b"(cos\nsystem\nS'id'\no.",
            b"(dp0\nS'weights'\np1\ncos\nsystem\n(S'id'\ntRs.",
            b"ccopy_reg\n_reconstructor\n(cos\nPathLike\nc__builtin__\nobject\nNtRp1\n",
        ],
    )
    def test_a_pickle_without_a_header_that_calls_something_is_noticed_whatever_follows(self, onnx, start):
        for content in (start, start + bytes(10_000)):
            (onnx / "extra.data").write_bytes(content)
            with pytest.raises(WeightsError, match=r"extra\.data is a pickle"):
                trust.check(onnx)

    @pytest.mark.parametrize(
        "text", ["cat\ndog\nelephant\n", "copyright\nMicrosoft\nAll rights reserved.", "N", "I am.", "."]
    )
    def test_text_that_begins_like_an_old_pickle_is_none(self, onnx, text):
        (onnx / "LICENSE").write_text(text)
        trust.check(onnx)

    @given(content=st.binary(min_size=1, max_size=100))
    def test_numbers_are_no_pickle(self, tmp_path_factory, content):
        path = tmp_path_factory.mktemp("numbers") / "data"
        path.write_bytes(b"N" + content + bytes(5_000))
        files.needed(path)

    def test_numbers_that_begin_like_a_program_for_windows_are_no_program(self, tmp_path):
        (tmp_path / "data").write_bytes(b"MZ" + bytes(range(200)))
        assert files.needed(tmp_path / "data") == tmp_path / "data"

    def test_a_file_whose_device_fails_is_named(self):
        # Reading this process's memory at address 0 fails with an input/output error, as a broken disk does.
        with pytest.raises(WeightsError, match="cannot be read: Input/output error"):
            files.text(Path("/proc/self/mem"))

    def test_a_link_within_the_folder_is_followed(self, onnx):
        (onnx / "model.onnx.data").rename(onnx / "numbers")
        (onnx / "model.onnx.data").symlink_to(onnx / "numbers")
        trust.check(onnx)

    def test_a_link_to_itself_is_refused(self, onnx):
        (onnx / "notes").symlink_to("notes")
        with pytest.raises(WeightsError, match="notes is a link that leads nowhere"):
            trust.check(onnx)

    def test_a_folder_that_is_itself_a_link_is_followed(self, onnx, tmp_path):
        (tmp_path / "latest").symlink_to(onnx)
        trust.check(tmp_path / "latest")

    def test_links_of_the_hubs_cache_lead_to_its_own_blobs_alone(self, onnx, tmp_path):
        repository = tmp_path / "models--organization--name"
        snapshot = repository / "snapshots" / ("0" * 40) / "cpu"
        (repository / "blobs").mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for index, path in enumerate(onnx.iterdir()):
            shutil.copy(path, repository / "blobs" / str(index))
            (snapshot / path.name).symlink_to(repository / "blobs" / str(index))
        trust.check(snapshot)
        (tmp_path / "secret").write_text("{}")
        (snapshot / "config.json").unlink()
        (snapshot / "config.json").symlink_to(tmp_path / "secret")
        with pytest.raises(WeightsError, match=r"config\.json is a link to .*secret, outside its folder"):
            trust.check(snapshot)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"])
    def test_a_file_too_large_to_be_what_it_is_called_is_not_read(self, onnx, name):
        with (onnx / name).open("wb") as stream:
            stream.truncate(65 * files.MiB)  # takes no space
        with pytest.raises(WeightsError, match=rf"{re.escape(name)} has 68157440 bytes, and at most \d+ are read"):
            trust.check(onnx)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"])
    def test_json_that_two_readers_may_understand_differently_is_refused(self, onnx, name):
        (onnx / name).write_text('{"a": {"b": 1, "c": [{"d": 1, "d": 2}]}}')
        with pytest.raises(WeightsError, match=rf"{re.escape(name)} has the key a\.c\.d twice"):
            trust.check(onnx)

    def test_a_key_that_comes_twice_among_many_is_found_in_as_many_steps_as_there_are(self, tmp_path):
        compared = 0

        class Name(str):
            __hash__ = str.__hash__

            def __eq__(self, other: object) -> bool:
                nonlocal compared
                compared += 1
                return str.__eq__(self, other)

        names = [Name(number) for number in (*range(95_000), 94_999)]
        with pytest.raises(WeightsError, match="has the key 94999 twice"):
            files.plain(tmp_path / "tokenizer.json", files.Pairs((name, 0) for name in names))
        assert compared < 10 * len(names)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"{", "is not JSON"),
            (b"[" * 100_000, "is not JSON"),
            (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON"),
            (b'{"a": NaN}', "is not JSON"),
            (b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}", "has values more than 64 deep"),
            (b'{"a": ' * 900 + b"1" + b"}" * 900, "has values more than 64 deep"),
            (b"\xef\xbb\xbf{}", "is not JSON"),
            ("{}".encode("utf-16"), "is not UTF-8"),
            (b"[]", "is not a JSON object"),
        ],
    )
    @pytest.mark.parametrize("name", ["genai_config.json", "tokenizer_config.json", "config.json"])
    def test_what_is_no_plain_json_object_is_refused(self, onnx, name, content, reason):
        (onnx / name).write_bytes(content)
        with pytest.raises(WeightsError, match=rf"{re.escape(name)} {reason}"):
            trust.check(onnx)


class TestGenaiConfig:
    def test_the_embedded_model_passes_in_little_time(self, onnx):
        start = time.process_time()
        trust.check(onnx)
        assert time.process_time() - start < 5  # about 0.03 s

    @pytest.mark.parametrize(
        ("path", "value"),
        [
            ("model/decoder/inputs/position_ids", "position_ids"),
            ("model/eos_token_id", 32000),
            ("model/decoder/session_options/provider_options", [{"cuda": {"enable_cuda_graph": "0"}}]),
            ("model/decoder/session_options/provider_options", [{"dml": {}}]),
            ("model/decoder/session_options/provider_options", [{"dml": {"enable_graph_capture": "1"}}]),
            ("model/decoder/session_options/provider_options", [{"cpu": {}}]),
            ("model/decoder/session_options/intra_op_num_threads", 4),
            ("model/decoder/session_options/ep.cuda.fpa_intb_gemm", "1"),
            ("model/decoder/sliding_window", {"window_size": 2047, "slide_inputs": False, "layers": [0, 1]}),
            ("search/top_p", 1),
            ("model/context_length", 131072),
        ],
    )
    def test_what_the_model_builders_write_is_allowed(self, onnx, path, value):
        assert genai_config.read(configured(onnx, path, value))

    @pytest.mark.parametrize(
        ("path", "value", "words"),
        [
            ("model/context_length", 0, "an integer from 16 to 1048576"),
            ("model/context_length", 2**40, "an integer from 16 to 1048576"),
            ("model/context_length", 4096.0, "an integer from 16 to 1048576"),
            ("model/context_length", True, "an integer from 16 to 1048576"),
            ("model/type", "gemma", "'phi3'"),
            ("model/eos_token_id", "1", "an integer from -1 to 2147483647"),
            ("model/eos_token_id", [1] * 65, "a list of at most 64"),
            ("model/decoder", [], "an object"),
            ("model", None, "an object"),
            ("model/decoder/inputs/input_ids", "a\nb", "a name of 1 to 60 letters"),
            ("model/decoder/inputs/input_ids", "a" * 201, "a name of 1 to 60 letters"),
            ("model/decoder/session_options/enable_mem_pattern", "true", "true or false"),
            ("model/decoder/session_options/ep.cuda.fpa_intb_gemm", 1, "'0' or '1'"),
            ("model/decoder/session_options/provider_options", {}, "a list of at most 3"),
            ("search/temperature", "1", "a number from 0 to 100"),
            ("search/temperature", 1e9, "a number from 0 to 100"),
        ],
    )
    def test_a_value_that_is_not_allowed_is_refused_with_its_path_and_what_is(self, onnx, path, value, words):
        dotted = path.replace("/", ".")
        with pytest.raises(WeightsError, match=rf"has {re.escape(dotted)}.* it must be {re.escape(words)}"):
            genai_config.read(configured(onnx, path, value))

    @pytest.mark.parametrize(
        ("path", "value", "has"),
        [
            ("model/decoder/num_hidden_layers", 3, "4"),
            ("model/decoder/num_hidden_layers", 5, "4"),
            ("model/decoder/num_key_value_heads", 7, "6"),
            ("model/decoder/head_size", 16, "32"),
            ("model/vocab_size", 999_999, "2112 logits"),
            ("model/context_length", 4097, "4096 positions"),
            ("model/eos_token_id", 2112, "2112 logits"),
            ("model/eos_token_id", [5000, 6000], "2112 logits"),
            ("model/eos_token_id", -1, "2112 logits"),
            ("model/eos_token_id", [2048, -1], "2112 logits"),
            ("model/eos_token_id", [], "2112 logits"),
            ("model/decoder/inputs/attention_mask", "input_ids", "one input_ids, which another key names"),
            ("model/decoder/inputs/past_key_names", "present.%d.key", "no such name"),
            ("model/decoder/sliding_window", {}, "no layer that keeps a window"),
            ("model/decoder/sliding_window", {"window_size": 1}, "no layer that keeps a window"),
            ("model/decoder/inputs/input_ids", "tokens", "no such name"),
            ("model/decoder/inputs/position_ids", "position_ids", "no such name"),
            ("model/decoder/inputs/past_key_names", "past.%d.key", "no such name"),
            ("model/decoder/outputs/logits", "scores", "no such name"),
            ("model/decoder/outputs/present_value_names", "now.%d.value", "no such name"),
        ],
    )
    def test_what_does_not_fit_the_graph_is_refused_with_its_path_and_what_the_graph_has(self, onnx, path, value, has):
        dotted = path.replace("/", ".")
        with pytest.raises(
            WeightsError, match=rf"has {re.escape(f'{dotted} {value}')}, and the graph in model\.onnx has {has}:"
        ):
            trust.check(configured(onnx, path, value))

    def test_keys_and_values_that_no_machine_has_room_for_are_refused(self, onnx):
        config = genai_config.read(configured(onnx, "model/decoder/num_key_value_heads", 1024))
        config["model"]["decoder"]["head_size"] = 4096
        graph = onnx_graph.check(onnx / "model.onnx")
        inputs = {name: () if "past" in name else shape for name, shape in graph.inputs.items()}
        with pytest.raises(WeightsError, match="has keys and values of 134217728 bytes for each token"):
            genai_config.check_fits(onnx, config, replace(graph, inputs=inputs, head_size=None))

    @pytest.mark.parametrize(
        ("window", "key", "has"),
        [
            ({}, "window_size None", "300"),
            ({"window_size": 1}, "window_size 1", "300"),
            ({"window_size": 300}, "layers None", re.escape("[1]")),
            ({"window_size": 300, "layers": [0, 1]}, re.escape("layers [0, 1]"), re.escape("[1]")),
            ({"window_size": 300, "layers": [1], "slide_inputs": False}, "slide_key_value_cache None", "False"),
            (
                {"window_size": 300, "layers": [1], "slide_key_value_cache": False, "slide_inputs": True},
                "slide_inputs True",
                "False",
            ),
        ],
    )
    def test_a_window_that_is_not_the_graphs_is_refused(self, onnx, window, key, has):
        config = genai_config.read(configured(onnx, "model/decoder/sliding_window", window))
        graph = replace(onnx_graph.check(onnx / "model.onnx"), windows=[None, 300])
        with pytest.raises(WeightsError, match=rf"sliding_window\.{key}, and the graph in model\.onnx has {has}:"):
            genai_config.check_fits(onnx, config, graph)
        fitting = {"window_size": 300, "layers": [1], "slide_key_value_cache": False, "slide_inputs": False}
        config["model"]["decoder"]["sliding_window"] = fitting
        genai_config.check_fits(onnx, config, graph)

    def test_the_windows_of_a_graph_are_those_of_attentions_whose_cache_holds_no_more(self, tmp_path):
        numbers = {"local_window_size": 300, "sliding_window_cache": 1}
        parts = [field(1, name) + field(3, number) for name, number in numbers.items()]
        content = attention(parts[:1]) + attention(parts)
        (tmp_path / "model.onnx").write_bytes(model(graph(content, map(tensor, ("w", "cos", "sin")))))
        assert onnx_graph.check(tmp_path / "model.onnx").windows == [None, 300]

    @pytest.mark.parametrize("missing", ["vocab_size", "head_size"])
    def test_what_every_request_would_fail_without_is_missed(self, onnx, missing):
        content = json.loads((onnx / "genai_config.json").read_text())
        (content["model"] if missing == "vocab_size" else content["model"]["decoder"]).pop(missing)
        (onnx / "genai_config.json").write_text(json.dumps(content))
        with pytest.raises(WeightsError, match=rf"has no model\.(decoder\.)?{missing}: "):
            trust.check(onnx)

    @pytest.mark.parametrize(
        ("path", "value", "key", "name"),
        [
            ("outputs/logits", "present.0.key", "outputs.present_key_names", "present.0.key"),
            ("outputs/present_key_names", "present.%d.value", "outputs.present_value_names", "present.0.value"),
            ("inputs/past_value_names", "past_key_values.%d.key", "inputs.past_value_names", "past_key_values.0.key"),
        ],
    )
    def test_one_input_or_output_is_not_taken_for_two(self, onnx, path, value, key, name):
        folder = configured(onnx, f"model/decoder/{path}", value)
        with pytest.raises(WeightsError, match=rf"model\.decoder\.{key} .* has one {name}, which another key names"):
            trust.check(folder)

    @pytest.mark.parametrize("missing", ["inputs", "outputs", "num_hidden_layers"])
    def test_what_the_configuration_leaves_out_is_not_compared(self, onnx, missing):
        content = json.loads((onnx / "genai_config.json").read_text())
        del content["model"]["decoder"][missing]
        (onnx / "genai_config.json").write_text(json.dumps(content))
        trust.check(onnx)

    @pytest.mark.parametrize(
        "name", ["/etc/model.onnx", "../model.onnx", "a/model.onnx", "a\\model.onnx", "C:model.onnx"]
    )
    def test_a_graph_outside_the_folder_is_refused(self, onnx, name):
        with pytest.raises(WeightsError, match="which is not a file beside it"):
            trust.check(configured(onnx, "model/decoder/filename", name))

    @pytest.mark.parametrize("name", ["model.ort", "model", "model.onnx.data", ".."])
    def test_a_graph_in_another_format_is_refused(self, onnx, name):
        with pytest.raises(WeightsError, match=r"must end in \.onnx|not a file beside it"):
            trust.check(configured(onnx, "model/decoder/filename", name))


@pytest.fixture
def check(tmp_path):
    """Checks a graph, beside a file of 100 bytes."""

    def run(content: bytes) -> list[str]:
        (tmp_path / "model.onnx").write_bytes(content)
        (tmp_path / "data").write_bytes(bytes(100))
        return [path.name for path in onnx_graph.check(tmp_path / "model.onnx").files]

    return run


def attribute(number: int, content: bytes) -> bytes:
    return field(1, "value") + field(number, content)


EXTERNAL = tensor(location="data", offset="0", length="100")


class TestGraph:
    def test_the_files_of_a_graphs_weights_are_found(self, check):
        assert check(model(graph([node("Gather", "w", "x")], [EXTERNAL]))) == ["data"]
        assert check(model(graph([node("Gather", "w", "x")], [tensor()]))) == []

    def test_weights_in_a_constant_and_in_a_branch_are_found(self, check):
        constant = node("Constant", attributes=[attribute(5, EXTERNAL)])
        assert check(model(graph([constant]))) == ["data"]
        choice = node("If", "out", attributes=[attribute(6, graph([constant]))])
        assert check(model(graph([node("Shape", "x"), choice]))) == ["data"]

    def test_an_output_uses_its_tensor(self, check):
        assert check(model(graph([], [tensor("out", location="data")]))) == ["data"]

    @pytest.mark.parametrize(
        ("external", "reason"),
        [
            ({"location": "data", "offset": "1", "length": "100"}, "wants 101 bytes of data, which has 100"),
            ({"location": "data", "offset": "101"}, "wants 101 bytes of data"),
            ({"location": "data", "offset": "-1"}, "has offset '-1' in the tensor 'w': it must be a number"),
            ({"location": "data", "length": "1" * 30}, "it must be a number"),
            ({"location": "data", "length": "1_0"}, "it must be a number"),
            ({"location": "other"}, "other is missing"),
            ({"location": "/etc/passwd"}, "names '/etc/passwd', which is not a file beside it"),
            ({"location": "../data"}, "which is not a file beside it"),
            ({"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096"}, "which is not a file beside it"),
            ({"location": ""}, "which is not a file beside it"),
            ({"location": "data\0"}, "which is not a file beside it"),
            ({"offset": "0"}, "names None, which is not a file beside it"),
            ({"location": "data", "checksum": "0"}, "has 'checksum' in the tensor 'w', which is unknown here"),
        ],
    )
    def test_weights_are_taken_from_within_a_file_beside_the_graph_alone(self, check, external, reason):
        content = model(graph([node("Gather", "w", "x")], [tensor(**external)]))
        with pytest.raises(WeightsError, match=re.escape(reason)):
            check(content)
        constant = node("Constant", attributes=[attribute(10, tensor(**external))])
        with pytest.raises(WeightsError, match=re.escape(reason)):
            check(model(graph([constant])))

    @pytest.mark.parametrize(
        ("operator", "domain"),
        [
            ("EPContext", "com.microsoft"),
            ("PythonOp", "com.microsoft"),
            ("Add", "com.microsoft"),
            ("Add", "evil"),
            ("BpeTokenizer", "ai.onnx.contrib"),
            ("ATen", "org.pytorch.aten"),
            ("add", ""),
            ("Loop", ""),
            ("", ""),
            ("\u0410dd", ""),  # a Cyrillic A
        ],
    )
    def test_an_operator_that_no_decoder_knows_is_refused_wherever_it_is(self, check, operator, domain):
        stranger = node(operator, "x", domain=domain)
        for content in (
            graph([stranger]),
            graph([node("If", "x", attributes=[attribute(6, graph([stranger]))])]),
            graph([node("If", "x", attributes=[attribute(11, graph([stranger]))])]),
        ):
            with pytest.raises(WeightsError, match=r"the operator .* which no decoder here knows"):
                check(model(content))

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (model(graph(), field(25, b"")), "functions"),
            (model(graph(), field(20, b"")), "training_info"),
            (model(graph(), field(99, b"")), "a field 99 in ModelProto, which is unknown here"),
            (model(graph(), field(14, field(1, "ort_config") + field(2, "{}"))), "ort_config"),
            (model(graph(more=field(15, b""))), "sparse_initializer"),
            (model(graph(), field(7, graph())), "graph in ModelProto twice"),
            (model(graph([node() + field(4, "Sub")])), "op_type in NodeProto twice"),
            (model(graph([node() + field(8, "x")])), "overload"),
            (model(graph([node(attributes=[attribute(22, b"")])])), "sparse_tensor"),
            (model(graph([node(attributes=[attribute(21, b"x")])])), "ref_attr_name"),
            (model(graph([node("Gather", "w", "x", attributes=[field(1, "axis") + field(3, 0)] * 2)])), "'axis' twice"),
            (model(graph([], [tensor() + field(14, 1)])), "of which it is not clear where its data are"),
            (model(graph([], [tensor() + field(14, 2**32 + 1)])), "of which it is not clear where its data are"),
            (model(graph([], [tensor() + entries(location="data")])), "of which it is not clear where its data are"),
            (model(graph([], [EXTERNAL + entries(location="data")])), "'location' twice"),
            (model(graph([], [EXTERNAL])), "'data' for the tensor 'w', which no node uses"),
            (b"", "is empty"),
            (b"not ONNX at all", "model.onnx"),
            (field(1, 10), "is no ONNX graph"),
            (field(7, 5), "is no ONNX graph"),
            (model(graph([field(4, 5)])), "is no ONNX graph"),
            (protobuf.varint(7 << 3 | 2) + protobuf.varint(1000) + b"x", "is cut off"),
            (b"\x80" * 20, "is no ONNX graph"),
            (b"\x3b", "is no ONNX graph"),  # a group, which protobuf no longer has
        ],
    )
    def test_what_is_strange_is_refused(self, check, content, reason):
        with pytest.raises(WeightsError, match=re.escape(reason)):
            check(content)

    def test_graphs_within_graphs_come_to_an_end(self, check):
        content = graph([node()])
        for _ in range(200):
            content = graph([node("If", "x", attributes=[attribute(6, content)])])
        with pytest.raises(WeightsError, match="graphs within graphs, more than 1 deep"):
            check(model(content))

    def test_a_file_that_would_take_for_ever_is_given_up(self, check, monkeypatch):
        monkeypatch.setattr(trust.protobuf, "_MOST_FIELDS", 1000)
        with pytest.raises(WeightsError, match="more than 1000 fields"):
            check(model(graph(more=field(2, "") * 2000)))
        monkeypatch.setattr(trust.protobuf, "_MOST_TEXT", 1000)
        with pytest.raises(WeightsError, match="more than 1000 bytes of names"):
            check(model(graph([node("Add", "x" * 2000)])))

    @pytest.mark.parametrize("sizes", [field(1, 300) + field(1, 48), field(1, protobuf.varint(300) + b"\x30")])
    def test_the_positions_are_those_of_the_table_that_attention_reads(self, tmp_path, sizes):
        tables = [sizes + field(2, 1) + field(8, name) + field(9, b"") for name in ("cos", "sin")]
        first = b"".join(field(5, each) for each in [tensor(), *tables])  # tensors and nodes come in any order
        for content in (graph(attention(), [tensor(), *tables]), first + graph(attention(), [])):
            (tmp_path / "model.onnx").write_bytes(model(content))
            assert onnx_graph.check(tmp_path / "model.onnx").positions == 300

    def test_a_shape_of_many_dimensions_is_read_in_one_go(self, check):
        dimensions = field(1, field(1, 7)) * 200_000
        content = graph(more=field(11, field(1, "y") + field(2, field(1, field(2, dimensions)))))
        start = time.process_time()
        assert check(model(content)) == []
        assert time.process_time() - start < 10  # about 1 s; it was 16 s for a file of this size

    def test_weights_within_the_graph_are_not_read(self, check, tmp_path):
        weights = field(9, bytes(50 * files.MiB))
        content = model(graph([node("Gather", "w", "x")], [field(1, 1) * 2 + field(2, 2) + field(8, "w") + weights]))
        start = time.process_time()
        assert check(content) == []
        assert time.process_time() - start < 5

    def test_what_the_package_onnx_says_of_the_embedded_graph_is_what_is_found(self):
        onnx = pytest.importorskip("onnx")
        path = ARTIFACTS / "onnx" / "model.onnx"
        proto = onnx.load(path, load_external_data=False)
        locations = {entry.value for tensor in proto.graph.initializer for entry in tensor.external_data[:1]}
        found = onnx_graph.check(path)
        assert {file.name for file in found.files} == locations
        for shapes, values in ((found.inputs, proto.graph.input), (found.outputs, proto.graph.output)):
            assert shapes == {
                value.name: tuple(
                    size.dim_value if size.HasField("dim_value") else None for size in value.type.tensor_type.shape.dim
                )
                for value in values
            }
        assert (found.head_size, found.positions, found.windows) == (32, 4096, [None] * 4)
        assert found.mask == "attention_mask"

    def test_the_fp32_export_passes(self, fp32_onnx):
        trust.check(fp32_onnx)

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
    @given(data=st.data())
    def test_a_damaged_graph_is_refused_or_passes_but_never_breaks_the_reader(self, onnx, data):
        whole = (ARTIFACTS / "onnx" / "model.onnx").read_bytes()
        content = bytearray(whole)
        for position in data.draw(st.lists(st.integers(0, len(whole) - 1), max_size=5)):
            content[position] = data.draw(st.integers(0, 255))
        del content[data.draw(st.integers(len(whole) // 2, len(whole))) :]
        (onnx / "model.onnx").write_bytes(content)
        with suppress(WeightsError):
            onnx_graph.check(onnx / "model.onnx")


class TestTransformers:
    def test_the_embedded_model_passes(self, transformers):
        trust.check_transformers(transformers)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "modeling_phi3.py", "run.sh", "lib.so"])
    def test_a_file_that_transformers_could_import_or_unpickle_is_refused(self, transformers, name):
        for part in ("model", "components/tokenizer"):
            path = transformers / part / name
            path.write_text("anything")
            with pytest.raises(WeightsError, match=rf"{re.escape(name)} is nothing that a model of safetensors needs"):
                trust.check_transformers(transformers)
            path.unlink()

    def test_a_pickle_under_the_name_of_safetensors_is_refused(self, transformers):
        (transformers / "model" / "model.safetensors").write_bytes(b"\x80\x04\x95" + bytes(100))
        with pytest.raises(WeightsError, match=r"model\.safetensors is a pickle"):
            trust.check_transformers(transformers)

    def test_an_index_that_names_a_pickle_is_refused(self, transformers):
        index = transformers / "model" / "model.safetensors.index.json"
        index.write_text('{"weight_map": {"a": "pytorch_model.bin"}}')
        with pytest.raises(WeightsError, match=r"names 'pytorch_model\.bin', which is not \.safetensors"):
            trust.check_transformers(transformers)

    @pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
    @pytest.mark.parametrize("value", ["organization/kernel", "organization/kernel@main:x", {"": "a/b"}, 1])
    def test_a_configuration_that_names_code_on_the_hub_is_refused(self, transformers, key, value):
        change(transformers / "model" / "config.json", **{key: value})
        with pytest.raises(WeightsError, match=rf"has {key} .* which may name code on the hub"):
            trust.check_transformers(transformers)
        change(transformers / "model" / "config.json", **{key: "sdpa"})
        trust.check_transformers(transformers)

    def test_other_weights_and_other_models_are_refused(self, transformers):
        change(transformers / "model" / "config.json", transformers_weights="adapter_model.bin")
        with pytest.raises(WeightsError, match="transformers_weights"):
            trust.check_transformers(transformers)
        shutil.copy(ARTIFACTS / "transformers" / "config.json", transformers / "model")
        (transformers / "model" / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else"}')
        with pytest.raises(WeightsError, match=r"adapter_config\.json names another model"):
            trust.check_transformers(transformers)

    def test_code_that_auto_map_names_does_not_run(self, tmp_path):
        from phi3_mlflow.weights import resolve

        folder = shutil.copytree(ARTIFACTS / "transformers", tmp_path / "weights")
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'mark')!r}, 'w')\nclass Evil: pass\n")
        for name, key in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
            change(folder / name, auto_map={key: "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
        assert resolve(folder, "transformers").folder == folder
        import click.testing

        from phi3_mlflow.cli import cli

        result = click.testing.CliRunner().invoke(cli, ["log", "transformers", "--weights", str(folder)])
        assert result.exit_code == 0, result.output
        import mlflow.pyfunc

        question = {"messages": [{"role": "user", "content": "What is the capital of Spain?"}]}
        model = mlflow.pyfunc.load_model(result.stdout.strip())
        assert "Madrid" in model.predict(question)[0]["choices"][0]["message"]["content"]
        assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("kind", ["past", "present"])
@pytest.mark.parametrize(
    "name", ["%s", "%n", "%2$n", "past.%d.%d", "%%d", "%5d", "past.key", "a" * 60 + "%d", "past %d", ""]
)
def test_names_that_reach_printf_hold_nothing_of_it_but_one_number(tmp_path, kind, name):
    copy = shutil.copytree(ARTIFACTS / "onnx", tmp_path / "onnx")
    path = copy / "genai_config.json"
    content = json.loads(path.read_text("utf-8"))
    decoder = content["model"]["decoder"]
    decoder["inputs" if kind == "past" else "outputs"][f"{kind}_key_names"] = name
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(WeightsError, match=rf"{kind}_key_names .* with one %d for the layer"):
        trust.check(copy)


def test_what_is_no_plain_file_is_refused(tmp_path):
    copy = shutil.copytree(ARTIFACTS / "onnx", tmp_path / "onnx")
    os.mkfifo(copy / "pipe")
    with pytest.raises(WeightsError, match="pipe is no plain file"):
        trust.check(copy)
