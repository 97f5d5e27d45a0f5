"""`phi3-mlflow verify`: files, contents and signatures of a logged model. Run: pytest tests/test_verify.py.

Signatures are made by sigstore's model-signing package, with keys and certificates that need no network.
"""

import datetime
import json
import shutil
from pathlib import Path

import attack
import mlflow.pyfunc
import pytest
import yaml
from click.testing import CliRunner, Result

from phi3_mlflow.cli import cli
from phi3_mlflow.runtime.errors import WeightsError


@pytest.fixture(params=["onnx", "transformers"])
def model(request: pytest.FixtureRequest, saved: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(saved[request.param], tmp_path / "model")


@pytest.fixture
def onnx(onnx_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(onnx_model, tmp_path / "model")


def verify(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["verify", *map(str, arguments)])


def line(result: Result, name: str) -> str:
    """The table's line on one thing."""
    return next(line for line in result.stdout.splitlines() if line[13:].startswith(f"{name} "))


def weights(model: Path) -> Path:
    folder = model / "artifacts" / "weights"
    return folder if folder.is_dir() else model / "model"


class TestFiles:
    def test_a_model_as_it_was_logged_passes_and_every_file_is_named(self, model):
        result = verify(model)
        assert result.exit_code == 0, result.output
        listed = json.loads(next(model.rglob("manifest.json")).read_text())["files"]
        assert all(
            line(result, name if "/" in name else f"artifacts/weights/{name}").startswith("ok") for name in listed
        )
        assert line(result, "MLmodel").startswith("ok")
        assert line(result, "contents").startswith("ok")
        assert line(result, "signature").startswith("not checked")
        assert "there is no signature" in line(result, "signature")

    def test_the_json_says_the_same(self, model):
        result = verify(model, "--json")
        content = json.loads(result.stdout)
        assert result.exit_code == 0
        assert content["ok"] is True
        assert {check["status"] for check in content["checks"]} == {"ok", "not checked"}
        assert [check["name"] for check in content["checks"]][-3:] == ["MLmodel", "contents", "signature"]
        assert result.stderr == ""

    def test_a_changed_a_missing_and_an_additional_file_are_all_named(self, model):
        folder = weights(model)
        (folder / "config.json").write_text("{}")
        (folder / "generation_config.json").unlink()
        (folder / "more.json").write_text("{}")
        result = verify(model)
        assert result.exit_code == 1
        for name, reason in (
            ("config.json", "has 2 bytes where manifest.json lists"),
            ("generation_config.json", "it is not there"),
            ("more.json", "is not listed in manifest.json"),
        ):
            found = line(result, (folder / name).relative_to(model).as_posix())
            assert found.startswith("failed")
            assert reason in found
        assert json.loads(verify(model, "--json").stdout)["ok"] is False

    def test_the_name_of_a_file_is_nothing_that_a_terminal_obeys(self, onnx):
        (weights(onnx) / "\x1b]0;title\x07\x9b2J.json").write_text("{}")
        loaded = CliRunner().invoke(cli, ["chat", "-p", "x", str(onnx)])
        checked = verify(onnx)
        for result, text in ((checked, checked.stdout), (loaded, loaded.stderr)):
            assert result.exit_code == 1
            assert r"\x1b]0;title\x07\x9b2J.json is not listed in manifest.json" in text
            assert not any(char in text for char in "\x1b\x07\x9b")

    @pytest.mark.parametrize("given", ["a relative path", "a URI"])
    def test_files_are_told_where_the_user_said_the_model_is(self, model, given, monkeypatch):
        monkeypatch.chdir(model.parent)
        uri = model.name if given == "a relative path" else model.as_uri()
        content = yaml.safe_load((model / "MLmodel").read_text())
        del content["metadata"]["weights"]["sha256"]
        (model / "MLmodel").write_text(yaml.safe_dump(content))
        (weights(model) / "config.json").write_text("{}")
        (weights(model) / "genai_config.json").unlink(missing_ok=True)
        checks = {check["name"]: check["detail"] for check in json.loads(verify(uri, "--json").stdout)["checks"]}
        assert checks["MLmodel"].startswith(f"{uri}/MLmodel has no metadata.weights.sha256")
        place = f"{uri}/{weights(model).relative_to(model).as_posix()}"
        assert checks[f"{weights(model).relative_to(model).as_posix()}/config.json"].startswith(f"{place}/config.json")
        assert checks["contents"].startswith(f"{place}/")
        assert checks["signature"] == f"there is no signature ({uri}/model.sig)"

    def test_such_a_model_is_not_loaded_either(self, model):
        (weights(model) / "more.json").write_text("{}")
        with pytest.raises(WeightsError, match=r"more\.json is not listed in manifest\.json"):
            mlflow.pyfunc.load_model(str(model))

    def test_weights_and_a_manifest_from_elsewhere_do_not_fit_mlmodel(self, model):
        from phi3_mlflow.runtime import manifest, trust

        place = next(model.rglob("manifest.json")).parent
        (weights(model) / "generation_config.json").write_text('{"eos_token_id": 1}')
        manifest.write(place, ("",) if place != model else trust.TRANSFORMERS_PARTS)
        result = verify(model)
        assert result.exit_code == 1
        assert line(result, "MLmodel").startswith("failed")
        assert "metadata.weights.sha256" in line(result, "MLmodel")
        with pytest.raises(WeightsError, match=r"metadata\.weights\.sha256"):
            mlflow.pyfunc.load_model(str(model))

    def test_an_mlmodel_without_the_digest_is_told_apart(self, model):
        content = yaml.safe_load((model / "MLmodel").read_text())
        del content["metadata"]["weights"]["sha256"]
        (model / "MLmodel").write_text(yaml.safe_dump(content))
        result = verify(model)
        assert result.exit_code == 1
        assert "has no metadata.weights.sha256 to compare the weights with" in line(result, "MLmodel")
        with pytest.raises(WeightsError, match=r"has no metadata\.weights\.sha256"):
            mlflow.pyfunc.load_model(str(model))

    def test_weights_that_could_run_code_are_named_without_being_loaded(self, onnx_model, tmp_path):
        pytest.importorskip("onnx")
        mark = tmp_path / "mark"
        library = attack.library(tmp_path / "evil.so", mark)

        def change(config: dict) -> None:
            config["model"]["decoder"]["session_options"]["custom_ops_library"] = attack.NAME

        folder = attack.folder(tmp_path / "weights", {attack.NAME: library}, change)
        result = verify(attack.model(tmp_path / "model", onnx_model, folder))
        assert result.exit_code == 1
        assert line(result, f"artifacts/weights/{attack.NAME}").startswith("ok")
        assert "model.decoder.session_options.custom_ops_library" in line(result, "contents")
        assert not mark.exists()

    def test_what_is_no_model_of_ours_is_one_clean_line(self, onnx, tmp_path):
        (onnx / "MLmodel").write_text("flavors: {}\n")
        shutil.rmtree(onnx / "artifacts")
        for what in (onnx, tmp_path / "missing", "models:/nobody/1"):
            result = verify(what)
            assert result.exit_code == 1
            assert result.stderr.startswith("Error: ")
            assert result.stderr.count("\n") == 1

    def test_a_missing_manifest_is_a_failed_check(self, model):
        next(model.rglob("manifest.json")).unlink()
        result = verify(model)
        assert result.exit_code == 1
        assert "manifest.json cannot be read: it is not there" in result.stdout


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private and a public key, as PEM files."""
    return make_keys(tmp_path / "signer")


def make_keys(path: Path) -> tuple[Path, Path]:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = path.with_suffix(".key"), path.with_suffix(".pem")
    encoding = serialization.Encoding.PEM
    private.write_bytes(
        key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )
    public.write_bytes(key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def sign(model: Path, private: Path, signature: Path | None = None) -> None:
    from model_signing import hashing, signing

    signature = signature or model / "model.sig"
    ignored = hashing.Config().set_ignored_paths(paths=["model.sig"])
    config = signing.Config().use_elliptic_key_signer(private_key=private).set_hashing_config(ignored)
    config.sign(model, signature)


class TestSignature:
    @pytest.fixture(autouse=True)
    def _package(self) -> None:
        pytest.importorskip("model_signing")

    def test_a_signed_model_passes_and_loads(self, model, keys):
        private, public = keys
        sign(model, private)
        result = verify(model, "--public-key", public)
        assert result.exit_code == 0, result.output
        assert line(result, "signature").startswith("ok")
        mlflow.pyfunc.load_model(str(model))

    def test_a_signature_without_a_key_is_said_plainly(self, onnx, keys):
        sign(onnx, keys[0])
        result = verify(onnx)
        assert result.exit_code == 0
        assert line(result, "signature").startswith("not checked")
        assert "there is a signature" in line(result, "signature")
        assert "give --public-key" in line(result, "signature")

    def test_a_key_without_a_signature_fails(self, onnx, keys):
        result = verify(onnx, "--public-key", keys[1])
        assert result.exit_code == 1
        assert line(result, "signature").startswith("failed")
        assert "there is no signature" in line(result, "signature")

    def test_the_models_code_is_signed_too(self, onnx, keys):
        sign(onnx, keys[0])
        with (onnx / "onnx_model.py").open("a") as stream:
            stream.write("\nprint('more')\n")
        result = verify(onnx, "--public-key", keys[1])
        assert result.exit_code == 1
        assert "onnx_model.py" in line(result, "signature")
        assert line(result, "contents").startswith("ok")

    def test_an_additional_file_of_code_is_noticed(self, onnx, keys):
        sign(onnx, keys[0])
        (onnx / "code" / "phi3_mlflow" / "more.py").write_text("")
        assert "code/phi3_mlflow/more.py" in line(verify(onnx, "--public-key", keys[1]), "signature")

    def test_somebody_elses_signature_is_refused(self, onnx, keys, tmp_path):
        sign(onnx, make_keys(tmp_path / "somebody")[0])
        result = verify(onnx, "--public-key", keys[1])
        assert result.exit_code == 1
        assert "does not fit this model and this key" in line(result, "signature")

    @pytest.mark.parametrize("content", ["", "{}", "[]", "\x00", '{"mediaType": "x"}'])
    def test_what_is_no_signature_is_refused(self, onnx, keys, content):
        (onnx / "model.sig").write_text(content)
        result = verify(onnx, "--public-key", keys[1])
        assert result.exit_code == 1
        assert line(result, "signature").startswith("failed")

    def test_a_file_that_is_no_key_is_refused(self, onnx, keys):
        sign(onnx, keys[0])
        result = verify(onnx, "--public-key", onnx / "MLmodel")
        assert result.exit_code == 1
        assert line(result, "signature").startswith("failed")

    def test_a_signature_may_lie_elsewhere(self, onnx, keys, tmp_path):
        sign(onnx, keys[0], tmp_path / "elsewhere.sig")
        result = verify(onnx, "--public-key", keys[1], "--signature", tmp_path / "elsewhere.sig")
        assert result.exit_code == 0, result.output

    def test_a_signature_by_certificate_is_checked(self, onnx, tmp_path):
        from model_signing import signing

        private, certificate = make_certificate(tmp_path, "signer")
        _, other = make_certificate(tmp_path, "somebody")
        config = signing.Config().use_certificate_signer(
            private_key=private, signing_certificate=certificate, certificate_chain=[certificate]
        )
        config.sign(onnx, tmp_path / "model.sig")
        shutil.move(tmp_path / "model.sig", onnx)
        assert verify(onnx, "--certificate", certificate).exit_code == 0
        assert verify(onnx, "--certificate", other).exit_code == 1

    def test_a_key_and_certificates_together_are_refused(self, onnx, keys):
        result = verify(onnx, "--public-key", keys[1], "--certificate", keys[1])
        assert result.exit_code == 1
        assert "not with both" in result.stderr

    def test_folders_that_python_left_are_named_with_the_remedy(self, onnx, keys):
        sign(onnx, keys[0])
        cache = onnx / "code" / "phi3_mlflow" / "__pycache__"
        cache.mkdir(exist_ok=True)
        (cache / "x.cpython-311.pyc").touch()
        found = line(verify(onnx, "--public-key", keys[1]), "signature")
        assert "Python left __pycache__ folders there; delete them and verify again" in found

    def test_a_registered_model_is_signed_where_it_lies(self, keys, tmp_path):
        runner = CliRunner()
        logged = runner.invoke(cli, ["log", "onnx", "--register", "signed", "--json"])
        assert logged.exit_code == 0, logged.output
        uri = json.loads(logged.stdout)["model_uri"]
        folder = Path(shutil.copytree(local(uri), tmp_path / "copy"))
        sign(folder, keys[0])
        mlflow.MlflowClient().log_model_artifact(uri.removeprefix("models:/"), str(folder / "model.sig"))
        mlflow.pyfunc.load_model("models:/signed/1")  # leaves registered_model_meta beside MLmodel
        result = verify("models:/signed/1", "--public-key", keys[1])
        assert result.exit_code == 0, result.output
        assert line(result, "signature").startswith("ok")


def local(uri: str) -> Path:
    """The folder of a logged model in the local store."""
    from phi3_mlflow.azure.model import opened

    with opened(uri) as found:
        return found.folder


def make_certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A private key and a certificate that vouches for itself, as PEM files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import NameOID

    private, _ = make_keys(folder / name)
    key = serialization.load_pem_private_key(private.read_bytes(), None)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / f"{name}.crt"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return private, path
