"""`mtlflashattn selftest`: it is right about what is right, and finds what is planted."""

import dataclasses
import json

import pytest
import torch

from flash_attn_mps.tiers import BY_NAME, reference
from flash_attn_mps.tiers.metal import backward_kernels, compiler, simdgroup
from flash_attn_mps.tiers.metal.kernel import OPTIONAL_BUFFERS
from flash_attn_mps.tools.selftest import build, cases, run
from flash_attn_mps.tools.selftest.cases import FEATURES, Case
from flash_attn_shim.commands import main
from metal_host import compile_shader
from tests.attention import oracle as independent
from tests.attention import philox
from tests.replaced_tiers import replace_tier


def selftest(tmp_path, *arguments):
    """Exit status and the written report."""
    file = tmp_path / "report.json"
    status = main(["selftest", "--device", "cpu", "--json", str(file), *arguments])
    return status, json.loads(file.read_text())


@pytest.mark.parametrize("name", [name for name, feature in FEATURES.items() if not (feature.mask or feature.sinks)])
def test_its_oracle_agrees_with_that_of_the_tests(name):
    built = build.build(Case("torch", "float32", 40, 24, name), "cpu")
    p, feature = built.problem, FEATURES[name]
    scale = float(p.softmax_scale)
    how = {"softmax_scale": scale, "causal": feature.causal, "window_size": feature.window, "softcap": feature.softcap}
    how["alibi_slopes"] = p.alibi_slopes
    if feature.dropout:
        how["dropout_p"] = feature.dropout
        how["keep"] = philox.keep(p.seed, feature.dropout, p.batch, p.heads, p.max_seqlen_q, p.max_seqlen_k)
    q, k, v = p.q.double(), p.k, p.v
    if feature.codes == "uint8":
        k, v = k.view(torch.float8_e4m3fn), v.view(torch.float8_e4m3fn)
    k, v = k.double(), v.double()
    leaves = [x.requires_grad_(feature.gradients) for x in (q, k, v)]
    if feature.codes:
        k, v = k * p.k_descale.double()[:, None, :, None], v * p.v_descale.double()[:, None, :, None]
    if feature.layout.startswith("packed"):
        exact = independent.varlen(
            q, k, v, p.cu_seqlens_q, p.cu_seqlens_k, seqused_q=p.seqused_q, seqused_k=p.seqused_k, **how
        )
    elif feature.layout == "dense":
        exact = independent.dense(q, k, v, **how)
    else:
        ends = p.seqused_k + (0 if p.leftpad_k is None else p.leftpad_k)
        exact = independent.kvcache(
            q,
            k,
            v,
            cache_seqlens=ends,
            cache_batch_idx=p.kv_batch_idx,
            cache_leftpad=p.leftpad_k,
            block_table=p.block_table,
            **how,
        )
    theirs = built.of_sequences(exact.out, exact.lse)
    for (out, lse), our_out, our_lse in zip(theirs, built.out, built.lse, strict=True):
        torch.testing.assert_close(our_out, out, rtol=0, atol=1e-12)
        torch.testing.assert_close(our_lse, lse, rtol=0, atol=1e-12)
    if feature.gradients:
        grads = torch.autograd.grad(exact.out, leaves, built.dout.double())
        for ours, theirs in zip(built.gradients.values(), grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_masks_and_sinks_of_its_oracle():
    q, k, v = torch.randn(3, 2, 4), torch.randn(5, 1, 4), torch.randn(5, 1, 6)
    plain = {"scale": 0.5, "left": -1, "right": -1, "softcap": 0.0, "slopes": None, "sinks": None, "mask": None}
    mask = torch.tensor([True, False, True, False, True])
    some, _ = build.oracle.attention(q, k[mask], v[mask], **plain)
    masked, _ = build.oracle.attention(q, k, v, **{**plain, "mask": mask.expand(2, 3, 5)})
    added = torch.where(mask, 0.0, -torch.inf).expand(2, 3, 5)
    torch.testing.assert_close(masked, some)
    torch.testing.assert_close(build.oracle.attention(q, k, v, **{**plain, "mask": added})[0], some)
    sinks = torch.tensor([0.7, -1.0])
    _, lse = build.oracle.attention(q, k, v, **plain)
    out, with_sink = build.oracle.attention(q, k, v, **{**plain, "sinks": sinks})
    torch.testing.assert_close(with_sink, torch.logaddexp(lse, sinks.double()[:, None]))
    without = build.oracle.attention(q, k, v, **plain)[0]
    torch.testing.assert_close(out, without * torch.exp(lse - with_sink).T[..., None])
    leaves = [x.double().requires_grad_() for x in (q, k, v, sinks)]
    given = {**plain, "sinks": leaves[3], "mask": torch.randn(2, 3, 5) < 0.5}
    assert torch.autograd.gradcheck(lambda *qkvs: build.oracle.attention(*qkvs[:3], **given)[0], leaves)


def test_the_features_reach_every_buffer_of_the_kernels():
    by_name = {name: build.build(Case("torch", "float32", 8, 8, name), "cpu").problem for name in FEATURES}
    problems = list(by_name.values())
    reached = {name for name in OPTIONAL_BUFFERS if any(isinstance(getattr(p, name), torch.Tensor) for p in problems)}
    assert reached == set(OPTIONAL_BUFFERS)
    assert {p.k.stride(-1) for p in problems} == {1, 2}
    poisoned = {name for name, p in by_name.items() if p.k.isnan().any() and p.v.isnan().any()}
    assert poisoned == {
        *("packed, used", "used keys", "left padding", "cache index", "pages", "gradients, packed, used")
    }


@pytest.mark.parametrize("level", ["quick", "usual", "full"])
@pytest.mark.parametrize("metal_is_there", [False, True])
def test_cases_are_named_without_ambiguity(level, metal_is_there):
    found = list(cases.cases(level, metal_is_there))
    assert len(set(map(str, found))) == len(found)
    step = max(1, len(found) // 300)
    assert all(cases.parse(str(case)) == case for case in found[::step])
    tiers = {"decode", "simdgroup", "scalar", "torch"} if metal_is_there else {"torch", "cpu"}
    assert {case.tier for case in found} == tiers
    tried = [case for case in found if (case.tier, case.dtype, case.head_dim) == ("simdgroup", "float16", 64)]
    forward = {case.variant for case in tried if case.variant and not FEATURES[case.feature].gradients}
    assert forward == (set(map(str, simdgroup.FORWARD.fitting(2, 64, 64))) if metal_is_there else set())
    of_gradients = {case.variant for case in tried if case.variant} - forward
    candidates = set(map(str, filter(backward_kernels.KEYS.worth_tuning, backward_kernels.KEYS.fitting(2, 64, 64))))
    assert of_gradients >= candidates if metal_is_there else not of_gradients


@pytest.mark.parametrize("metal_is_there", [False, True])
def test_another_metal_tier_is_run_where_there_is_metal(metal_is_there, monkeypatch):
    monkeypatch.setitem(BY_NAME, "another", dataclasses.replace(simdgroup.TIER, name="another"))
    assert ("another" in {case.tier for case in cases.cases("quick", metal_is_there)}) == metal_is_there


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("simdgroup:float16:64:64", "not of the form"),
        ("simdgroup:float16:64:64:upside down", "feature 'upside down' is not known"),
        ("simdgroup:float8:64:64:full", "dtype 'float8' is not known"),
        ("simdgroup:float16:256:256:full:32x4x64-staged", "does not exist"),
    ],
)
def test_what_is_no_case_is_said(name, match, capsys):
    assert main(["selftest", "--device", "cpu", "--case", name]) == 2
    assert match in capsys.readouterr().err


def test_without_metal_it_tests_the_rest_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(cases._HEAD_DIMS, "quick", [(64, 64)])
    status, report = selftest(tmp_path, "--quick")
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "NO METAL KERNEL WAS TESTED: Metal kernels run on mps, not on cpu." in printed
    assert not report["metal tested"]
    assert report["cases"] == sum(report["outcomes"].values()) == len(list(cases.cases("quick", False)))
    assert report["outcomes"]["torch bfloat16 right"] == len(FEATURES)
    assert report["outcomes"]["cpu float32 right"] >= 10
    assert not report["failures"]
    assert report["machine"]["torch"] == torch.__version__


def test_an_error_of_the_torch_tier_is_found(tmp_path, monkeypatch, capsys):
    def slightly_off(p):
        result = reference_run(p)
        result.out[0].mul_(1.02)
        return result

    reference_run = reference.run
    replace_tier(monkeypatch, "torch", run=slightly_off)
    status, report = selftest(tmp_path, "--case", "torch:float32:64:64:softcap", "cpu:float32:64:64:full")
    assert status == 1
    (failure,) = report["failures"]
    assert failure["case"] == "torch:float32:64:64:softcap"
    assert failure["error, of allowed"] > 100
    assert "out of sequence 0" in failure["detail"]
    assert failure["call"]["softcap"] == 3.0
    printed = capsys.readouterr().out
    assert "1 FAILED" in printed
    assert "mtlflashattn selftest --case 'torch:float32:64:64:softcap'" in printed


def test_an_error_of_the_log_sum_exp_is_found(monkeypatch):
    def off(p):
        result = reference_run(p)
        result.lse[-1, 0, 3] += 1e-3
        return result

    reference_run = reference.run
    replace_tier(monkeypatch, "torch", run=off)
    outcome = run.run(Case("torch", "float16", 64, 64, "full"), "cpu")
    assert (outcome.status, outcome.detail) == ("wrong", "log-sum-exp of sequence 1 at (head, query) = (0, 3)")


def test_a_wrong_gradient_is_found(monkeypatch):
    def off(*arguments):
        grads = right(*arguments)
        grads.dk[1, 7, 0, 3] += 0.02
        return grads

    right = BY_NAME["torch"].backward
    replace_tier(monkeypatch, "torch", backward=off)
    outcome = run.run(Case("torch", "float16", 64, 64, "gradients, causal"), "cpu")
    assert (outcome.status, outcome.detail) == ("wrong", "gradient of k at (1, 7, 0, 3)")


METAL_CASES = (
    "simdgroup:float16:64:64:packed, everything",
    "simdgroup:bfloat16:128:128:bool mask",
    "simdgroup:float32:40:24:pages",
    "simdgroup:float16:64:64:packed, used:8x2x16-staged",
    "scalar:float16:64:64:left padding",
    "simdgroup:float16:64:64:gradients, packed, everything",
    "simdgroup:float32:40:24:gradients, packed, dropout:16x2x16-staged-threadgroup-reload-split",
)


def test_the_kernels_pass(tmp_path, metal, capsys):
    status, report = selftest(tmp_path, "--case", *METAL_CASES)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert report["metal tested"]
    assert "NO METAL" not in printed
    assert sum(report["outcomes"].values()) == len(METAL_CASES)


def test_a_kernel_that_forgets_its_mask_is_found(tmp_path, metal, monkeypatch):
    monkeypatch.setattr(
        compiler,
        "compile_shader",
        lambda source: compile_shader(source.replace("HAS_WINDOW_RIGHT 1", "HAS_WINDOW_RIGHT 0")),
    )
    status, report = selftest(tmp_path, "--case", "simdgroup:float16:64:64:causal", "simdgroup:float16:64:64:full")
    assert status == 1
    assert [(f["case"], f["status"]) for f in report["failures"]] == [("simdgroup:float16:64:64:causal", "wrong")]


def test_kernels_that_do_not_compile_are_all_reported_with_the_log(tmp_path, metal, monkeypatch, capsys):
    def refuse(source):
        if "#define ROWS 8" in source:
            raise SyntaxError("program_source:7: error: use of undeclared identifier 'fma'")
        return compile_shader(source)

    monkeypatch.setattr(compiler, "compile_shader", refuse)
    refused = [f"simdgroup:float16:64:64:full:8x{simdgroups}x16-direct" for simdgroups in (1, 2)]
    status, report = selftest(tmp_path, "--case", *refused, "simdgroup:float16:64:64:full:16x2x16-direct")
    assert status == 1
    assert [(f["case"], f["status"]) for f in report["failures"]] == [(name, "not compiled") for name in refused]
    assert all("undeclared identifier 'fma'" in f["detail"] for f in report["failures"])
    assert [entry["specialization"]["variant"][:2] for entry in report["compiler"]] == [[8, 1], [8, 2]]
    assert "not compiled" in capsys.readouterr().out


def test_a_tier_that_raises_or_refuses_what_it_should_serve_fails(tmp_path, monkeypatch, metal):
    replace_tier(monkeypatch, "torch", run=lambda p: 1 / 0)
    status, report = selftest(tmp_path, "--case", "torch:float16:64:64:full")
    assert status == 1
    assert report["failures"][0]["detail"] == "ZeroDivisionError: division by zero"
    outcome = run.run(Case("simdgroup", "float16", 300, 300, "full"), "cpu")
    assert (outcome.status, outcome.failed) == ("not served", True)


def test_kernels_are_tested_as_they_are(tmp_path, metal, monkeypatch, capsys):
    """A kernel that fails its proof is not replaced before the self-test can see it; one that does not compile, and
    whose calls another serves, is counted."""
    monkeypatch.setenv("MTLFLASHATTN_PROVE", "always")

    usual = int(simdgroup.default(2, 8, 8).staged)

    def wrong(source):
        if f"#define STAGED {usual}\n" in source:
            raise RuntimeError("XPC_ERROR_CONNECTION_INTERRUPTED")
        return compile_shader(source.replace("HAS_WINDOW_RIGHT 1", "HAS_WINDOW_RIGHT 0"))

    monkeypatch.setattr(compiler, "compile_shader", wrong)
    names = [f"simdgroup:float16:8:8:{feature}" for feature in ("causal", "full")]
    status, report = selftest(tmp_path, "--case", *names)
    assert status == 1
    assert [(f["case"], f["status"]) for f in report["failures"]] == [(names[0], "wrong")]
    assert "2 kernels do not work here; where a call was right, another served it" in capsys.readouterr().out
    assert len(report["compiler"]) == 2
