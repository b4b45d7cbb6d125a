"""Golden values: tests/golden/vq_hash_dev.npz. Labels, centroids, codebooks, distortions and elbows were computed by the
released functions of Hai-chao-Zhang/VQToken @ 019f89f (cases `fixed`, `adaptive`, `elbow`, `empty_cluster`); hash, summary and
raw codebook by our reference; `tokdense` holds the published rows. k-means starts from the stored centroids.
"""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import test_contract
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from mmcompress import create, num_kept
from mmcompress.io import from_pretrained, save_pretrained
from mmcompress.methods._vq import (
    HashMapper,
    TokenHash,
    choose,
    distortion,
    elbow,
    lloyd,
    place_summary,
    seed_rows,
    silhouette,
    unit,
)
from mmcompress.tokens import Layout, Tokens

MAPPER = {"mapper": True, "width": 16, "place_width": 6, "num_places": 5, "num_heads": 4}


def clip(T=4, H=3, W=5, D=16, B=2, seed=0, dtype=torch.float32):
    """Clips of few looks: every token is one of six directions of any length, and a little noise."""
    g = torch.Generator().manual_seed(seed)
    look = torch.randn(B, 6, D, generator=g)
    x = look.gather(1, torch.randint(6, (B, T * H * W), generator=g)[..., None].expand(-1, -1, D))
    x = x * (0.5 + torch.rand(B, T * H * W, 1, generator=g)) + 0.05 * torch.randn(x.shape, generator=g)
    return Tokens.of(x.to(dtype), Layout("video", (T, H, W)))


def trained(method, seed=1):
    """The method with every parameter of the mapper at random."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in method.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3)
    return method


def start(golden, kind):
    (case,) = golden("vq_hash", kind)
    return case, case["x"].flatten(0, 1)


# golden values


@pytest.mark.parametrize("kind", ["fixed", "empty_cluster", "raw_codebook"])
def test_golden_kmeans(golden, kind):
    case, x = start(golden, kind)
    got = lloyd(x, case["init"], case.get("max_iteration", case.get("max_iter", 100)), case["tol"])
    assert torch.equal(got.labels, case["labels"].flatten().long())
    assert got.num_iterations == case.get("iterations", got.num_iterations)
    torch.testing.assert_close(got.centroid, case["centroids"], rtol=0, atol=3e-5)
    count = got.labels.bincount(minlength=case["K"])
    assert torch.equal(count, case["counts"].long())
    for name, rows in (("codebook", unit(x)), ("codebook_raw", x)):
        if name in case:
            codebook = torch.zeros(case["K"], x.shape[1]).index_add(0, got.labels, rows) / count.clamp(min=1)[:, None]
            torch.testing.assert_close(codebook, case[name], rtol=0, atol=2e-5)


@pytest.mark.parametrize(("kind", "name", "fields"), [
    ("fixed", "codebook", {"codebook": "normalised"}),
    ("fixed", "codebook", {"mode": "official"}),
    ("raw_codebook", "codebook_raw", {}),
])  # fmt: skip
def test_golden_tokens(golden, monkeypatch, kind, name, fields):
    """The whole method, started from the stored centroids: the outputs are the codewords that are used, by first token."""
    case, x = start(golden, kind)
    monkeypatch.setattr("mmcompress.methods.vq_hash.lloyd", lambda rows, _, *rest: lloyd(rows, case["init"], *rest))
    out = create("vq_hash", num_codes=case["K"], **fields)(Tokens.of(x))
    labels = case["labels"].flatten().long()
    first = {int(code): i for i, code in reversed(list(enumerate(labels)))}
    order = sorted(first, key=first.get)
    torch.testing.assert_close(out.x[0], case[name][order], rtol=0, atol=3e-5)
    assert out.anchor[0].tolist() == sorted(first.values())
    assert torch.equal(torch.tensor(order)[out.assignment[0]], labels)
    assert torch.equal(out.size[0], case["counts"][order].float())


def test_golden_adaptive(golden):
    case, x = start(golden, "adaptive")
    k_min, k_max = case["K_min"], case["K_max"]
    inits = dict(zip(range(k_min, k_max + 1), case["inits"].split(list(range(k_min, k_max + 1))), strict=True))

    def run(k):
        return lloyd(x, inits[k], case["max_iteration"], case["tol"])

    found = [distortion(unit(x), run(k)) for k in inits]
    np.testing.assert_allclose(found, case["distortion"], rtol=1e-4)
    np.testing.assert_allclose(np.diff(found, n=2), case["second_difference"], atol=1e-4 * max(found))
    assert int(np.diff(found, n=2).argmax()) == case["argmax"]
    assert choose(x, k_min, k_max, "official", run) == case["K_official"]
    assert choose(x, k_min, k_max, "knee", run) == case["K_knee"]
    last = lloyd(x, case["init_final"], case["max_iteration"], case["tol"])
    assert torch.equal(last.labels, case["labels"].flatten().long())
    codebook = torch.zeros_like(case["codebook"]).index_add(0, last.labels, unit(x)) / last.labels.bincount()[:, None]
    torch.testing.assert_close(codebook, case["codebook"], rtol=0, atol=3e-5)


def test_golden_elbow(golden):
    (case,) = golden("vq_hash", "elbow")
    rows = [(case["distortion"].tolist(), case["K_official"], case["K_knee"]), ([10, 5, 4, 3.5, 3.4], 12, 13)]
    for values, official, knee in rows:
        assert elbow(values, 12, "official") == official and elbow(values, 12) == knee
    assert (case["K_official"], case["K_knee"]) == (12, 14)
    assert elbow([9.0, 4, 3, 2, 1.5, 1], 2) == 3 and elbow([3.0, 2, 1, 0], 2) == 3  # the first of equal bends


def test_golden_hash(golden):
    (case,) = golden("vq_hash", "hash")
    T, H, W = (case[k] for k in "THW")
    tokens = Tokens.of(torch.zeros(T * H * W, 1), Layout("video", (T, H, W)))
    hashed = TokenHash.of(case["labels"].flatten().long()[None])
    assert torch.equal(hashed.assignment.view(T, H, W), case["canonical"].long())
    assert hashed.mask.all() and hashed.anchor.shape == (1, case["K_used"])
    assert torch.equal(hashed.size[0], case["counts"].long())
    assert torch.equal(tokens.position[0][hashed.anchor[0]], case["first"].long())
    order = case["labels"].flatten().long()[hashed.anchor[0]]
    assert torch.equal(case["codebook"][order], case["codebook_canonical"])
    summary = place_summary(hashed, tokens.position, [case["emb_t"], case["emb_h"], case["emb_w"]])
    torch.testing.assert_close(summary[0], case["summary"], rtol=0, atol=1e-5)


# other oracles


def test_by_hand():
    """Eight tokens, 2 frames of 2 × 2, along three directions; the start is the draw, the result is not."""
    x = torch.tensor([[2.0, 0], [0, 1], [4, 0], [0, 3], [-1, 0], [6, 0], [-3, 0], [0, 5]])
    tokens = Tokens.of(x, Layout("video", (2, 2, 2)))
    for seed in range(5):
        out = create("vq_hash", num_codes=3, seed=seed)(tokens)
        if seed_finds_three(x, seed):
            assert out.anchor.tolist() == [[0, 1, 4]] and out.assignment.tolist() == [[0, 1, 0, 1, 2, 0, 2, 1]]
            assert out.x.tolist() == [[[4, 0], [0, 3], [-2, 0]]] and out.size.tolist() == [[3, 3, 2]]
    assert sum(seed_finds_three(x, seed) for seed in range(5)) >= 4
    out = create("vq_hash", num_codes=3, codebook="normalised")(tokens)
    torch.testing.assert_close(out.x[0], torch.tensor([[1.0, 0], [0, 1], [-1, 0]]))


def seed_finds_three(x, seed):
    return len(unit(x)[seed_rows(x, 3, seed)].unique(dim=0)) == 3


def test_kmeans_agrees_with_scikit_learn():
    """Its k-means is Euclidean: on the sphere the same, up to the centroids' norms, which are alike here."""
    x = clip(6, 4, 5, seed=3).x[0]
    u = unit(x)
    init = u[[i * 7 for i in range(6)]]
    got = lloyd(x, init, 50, 1e-4)
    want = KMeans(6, init=init.numpy(), n_init=1, max_iter=50, algorithm="lloyd").fit(u.numpy())
    assert np.array_equal(got.labels.numpy(), want.labels_)
    np.testing.assert_allclose(got.centroid.numpy(), want.cluster_centers_, atol=1e-5)
    np.testing.assert_allclose(distortion(u, got), want.inertia_, rtol=1e-4)


def naive_lloyd(x, centroid, max_iter, tol):
    """The specification as a loop, in float64."""
    u, step = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12), 0
    while step < max_iter:
        step += 1
        length = np.linalg.norm(centroid, axis=1)
        cosine = u @ np.where(length[:, None] > 0, centroid / np.maximum(length[:, None], 1e-300), 0).T
        labels = cosine.argmax(1)
        new = np.array([u[labels == k].mean(0) if (labels == k).any() else c for k, c in enumerate(centroid)])
        if np.linalg.norm(new - centroid) < tol:
            break
        centroid = new
    return labels, centroid, step, float((1 - cosine[np.arange(len(x)), labels]).sum())


@pytest.mark.parametrize("seed", range(4))
def test_kmeans_agrees_with_a_loop(seed):
    x = torch.randn(60, 7, generator=torch.Generator().manual_seed(seed))
    x[3] = 0
    got = lloyd(x, unit(x[10:18]), 50, 1e-4)
    labels, centroid, steps, _ = naive_lloyd(x.double().numpy(), unit(x[10:18]).double().numpy(), 50, 1e-4)
    assert np.array_equal(got.labels.numpy(), labels) and got.num_iterations == steps
    np.testing.assert_allclose(got.centroid.numpy(), centroid, atol=1e-5)


def test_silhouette_is_that_of_scikit_learn():
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    for k in (2, 5, 12):
        labels = lloyd(x, unit(x[:k]), 20, 1e-4).labels
        want = silhouette_score(x.double().numpy(), labels.numpy(), metric="cosine")
        assert silhouette(x, labels) == pytest.approx(want, abs=1e-5)
    assert silhouette(x, torch.zeros(50, dtype=torch.int64)) == 0
    many = torch.randn(1500, 4, generator=torch.Generator().manual_seed(0))
    label = (many[:, 0] > 0).long()
    assert silhouette(many, label, 0) == silhouette(many, label, 0) != silhouette(many, label, 1)


# what must hold


def test_fixed_point_and_monotone():
    x = torch.randn(80, 6, generator=torch.Generator().manual_seed(2))
    init = unit(x[:9])
    clusters = lloyd(x, init, 100, 1e-4)
    u = unit(x)
    assert torch.equal((u @ unit(clusters.centroid).T).argmax(1), clusters.labels)
    for k in range(9):
        torch.testing.assert_close(clusters.centroid[k], u[clusters.labels == k].mean(0), rtol=0, atol=1e-4)
    cost = [naive_lloyd(x.double().numpy(), init.double().numpy(), n, 0)[3] for n in range(1, clusters.num_iterations + 1)]
    assert len(cost) > 3 and all(b <= a + 1e-9 for a, b in pairwise(cost))
    here = 1 - (u * unit(lloyd(x, init, 3, 0.0).centroid)[lloyd(x, init, 4, 0.0).labels]).sum(-1)
    assert float(here.sum()) == pytest.approx(cost[3], abs=1e-4)  # ours walks the same steps


def test_scale_of_a_token_changes_no_label():
    tokens = clip()
    factor = torch.tensor([0.25, 8.0, 1024.0])[torch.arange(60) % 3]
    scaled = Tokens.of(tokens.x * factor[:, None], tokens.layout)
    method = create("vq_hash", num_codes=7)
    assert torch.equal(method(tokens).assignment, method(scaled).assignment)


def test_relabelled_codes_change_nothing():
    tokens, method = clip(), trained(create("vq_hash", num_codes=6, **MAPPER))
    out = method(tokens)
    swap = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    own = method.labels
    method.labels = lambda x: swap[own(x)]
    again = method(tokens)
    assert not torch.equal(again.x, create("vq_hash", num_codes=6)(tokens).x)
    for name in ("x", "anchor", "assignment", "size"):
        assert torch.equal(getattr(out, name), getattr(again, name))


def test_seed():
    tokens = clip(D=4)
    maps = [create("vq_hash", num_codes=4, seed=s)(tokens).assignment for s in (0, 0, 1, 2, 3)]
    assert torch.equal(maps[0], maps[1]) and any(not torch.equal(maps[0], m) for m in maps[2:])
    before = torch.get_rng_state()
    trained(create("vq_hash", num_codes=4, **MAPPER))(clip())
    assert torch.equal(torch.get_rng_state(), before), "the global generator is not touched"


def test_few_looks_give_few_codes_and_a_mask():
    same, varied = torch.ones(1, 20, 8), torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0))
    out = create("vq_hash", num_codes=6)(Tokens.of(torch.cat([same, varied])))
    assert out.mask.sum(1).tolist() == [1, 6] and out.size[0].tolist() == [20, 0, 0, 0, 0, 0]
    assert not out.x[0, 1:].any() and torch.equal(out.x[0, 0], torch.ones(8))
    alone = create("vq_hash", num_codes=6)(Tokens.of(same))
    assert alone.mask is None and alone.num_kept == 1
    method = trained(create("vq_hash", num_codes=6, **(MAPPER | {"width": 8})))
    torch.testing.assert_close(method(Tokens.of(torch.cat([same, varied]))).x[:1, :1], method(Tokens.of(same)).x)


def test_at_rest_the_centroids_are_not_replaced():
    x = clip().x[0]
    once = lloyd(x, unit(x[:5]), 50, 100.0)
    assert once.num_iterations == 1 and torch.equal(once.centroid, unit(x[:5]))
    assert lloyd(x, unit(x[:5]), 3, 0.0).num_iterations == 3


def test_reseed_empty():
    x = torch.rand(30, 6, generator=torch.Generator().manual_seed(0))
    x[4:6] = 0
    init = torch.cat([unit(x[:3]), -torch.ones(2, 6)])  # nothing is near the last two
    kept = lloyd(x, init, 50, 1e-4)
    assert kept.labels.bincount(minlength=5)[3:].tolist() == [0, 0] and torch.equal(kept.centroid[3:], init[3:])
    one = lloyd(x, init, 1, 1e-4, reseed_empty=True)
    assert torch.equal(one.labels, lloyd(x, init, 1, 1e-4).labels)
    cosine = [float(torch.cosine_similarity(row, one.centroid[k], 0)) for row, k in zip(x, one.labels, strict=True)]
    cosine = [2 if i in (4, 5) else c for i, c in enumerate(cosine)]  # a zero token is near nothing and far from nothing
    torch.testing.assert_close(one.centroid[3:], unit(x[sorted(range(30), key=cosine.__getitem__)[:2]]))
    moved = lloyd(x, init, 50, 1e-4, reseed_empty=True)
    assert moved.labels.bincount(minlength=5).min() > 0
    assert distortion(unit(x), moved) < distortion(unit(x), kept)
    equal = lloyd(torch.ones(8, 3), torch.eye(3), 50, 1e-4, reseed_empty=True)
    assert equal.labels.tolist() == [0] * 8 and equal.num_iterations == 2


@pytest.mark.parametrize("rule", ["knee", "official", "silhouette"])
def test_adaptive_counts(rule):
    tokens = clip(6, 4, 4, B=3)
    method = create("vq_hash", adaptive=True, k_min=3, k_max=10, rule=rule)
    out = method(tokens)
    counts = (out.mask.sum(1) if out.mask is not None else torch.full((3,), out.num_kept)).tolist()
    assert all(n <= method.num_kept(96) for n in counts)
    if rule == "silhouette":  # six looks are six codes
        assert counts == [6, 6, 6]
    if rule == "official":
        assert max(counts) <= 12
    for i in range(3):
        x = tokens.x[i]
        run = {k: lloyd(x, unit(x[seed_rows(x, k, 0)]), 100, 1e-4) for k in range(3, 13)}
        K = choose(x, 3, 10, rule, run.__getitem__)
        assert torch.equal(TokenHash.of(run[K].labels[None]).assignment[0], out.assignment[i])


def test_adaptive_on_few_tokens():
    method = create("vq_hash", adaptive=True)
    for N, kept in ((12, 12), (13, 13), (14, 13)):  # knee of 12, 13, 14 codes: 13
        assert method(Tokens.of(torch.randn(N, 8, generator=torch.Generator().manual_seed(0)))).num_kept == kept


def test_counts_and_keep_ratio():
    tokens = clip()
    for ratio in (0.1, 0.25, 0.9):
        out = create("vq_hash", num_codes=None, keep_ratio=ratio)(tokens)
        counts = (out.mask.sum(1) if out.mask is not None else torch.full((2,), out.num_kept)).tolist()
        assert max(counts) <= num_kept(60, ratio)
    spread = Tokens.of(torch.randn(60, 16, generator=torch.Generator().manual_seed(0)))
    assert create("vq_hash", num_codes=None, keep_ratio=0.1)(spread).num_kept == 6
    assert create("vq_hash")(spread).num_kept == 32 and create("vq_hash").num_kept(20) == 20
    out = create("vq_hash", num_codes=100)(spread)
    assert torch.equal(out.x, spread.x) and torch.equal(out.assignment[0], torch.arange(60))
    assert create("vq_hash", keep_ratio=1)(spread).x is spread.x
    with pytest.raises(ValueError, match=r"keep_ratio counts only with num_codes=None and adaptive=False, got keep_ratio=0\.1"):
        create("vq_hash", keep_ratio=0.1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("num_codes", [4, 100])
def test_input_that_is_not_finite(bad, num_codes):
    x = clip().x[0].clone()
    x[5, 2] = bad
    with pytest.raises(ValueError, match="finite"):
        create("vq_hash", num_codes=num_codes)(Tokens.of(x))


def test_init_of_a_wrong_shape():
    for init in (torch.ones(3, 5), torch.ones(4), torch.ones(70, 16), torch.ones(0, 16)):
        with pytest.raises(ValueError, match=r"init must have shape \[K, D\]"):
            lloyd(clip().x[0], init, 10, 1e-4)
    with pytest.raises(ValueError, match="at least 3"):
        elbow([2.0, 1.0], 12)


@pytest.mark.parametrize("fields", [
    {"num_codes": 0}, {"num_codes": 2.5}, {"k_min": 0}, {"k_max": 13}, {"rule": "bend"}, {"codebook": "mean"}, {"mode": "x"},
    {"max_iter": 0}, {"tol": -1}, {"seed": -1}, {"width": 12, "mapper": True}, {"width": None, "mapper": True},
    {"mode": "official", "mapper": True}, {"mode": "official", "reseed_empty": True},
])  # fmt: skip
def test_bad_fields(fields):
    with pytest.raises(ValueError, match=rf"^{next(iter(fields))}.* must .*got"):
        create("vq_hash", **fields)
    with pytest.raises(TypeError, match="adaptive must be True or False, got 1"):
        create("vq_hash", adaptive=1)


# the mapper


def test_an_untrained_mapper_gives_the_codebook():
    for dtype in (torch.float32, torch.bfloat16):
        tokens = clip(dtype=dtype)
        out = create("vq_hash", num_codes=8, **MAPPER)(tokens)
        assert torch.equal(out.x, create("vq_hash", num_codes=8)(tokens).x) and out.x.dtype == dtype


def naive_mapper(mapper, codebook, assignment, position, grid):
    """One item: mapper and attention as sums over heads and codes, from the module's parameters."""
    w = {k: v.detach().double() for k, v in mapper.state_dict().items()}
    K, D = codebook.shape
    h = torch.zeros(K, D, dtype=torch.float64)
    for k in range(K):
        members = [i for i, a in enumerate(assignment.tolist()) if a == k]
        for i in members:
            place = torch.zeros(w["places.0"].shape[1], dtype=torch.float64)
            for axis in range(3):
                table, n, at = w[f"places.{axis}"], grid[axis], int(position[i, axis])
                if n > len(table):  # between two rows
                    p = at * (len(table) - 1) / (n - 1)
                    low = min(int(p), len(table) - 2)
                    place += table[low] * (low + 1 - p) + table[low + 1] * (p - low)
                else:
                    place += table[at]
            h[k] += torch.nn.functional.gelu(place @ w["mlp.0.weight"].T + w["mlp.0.bias"]) / len(members)
    values = h @ w["mlp.2.weight"].T + w["mlp.2.bias"]
    B = codebook.double()
    q, k, v = (a @ p.T for a, p in zip((B, B, values), w["attention.in_proj_weight"].chunk(3), strict=True))
    heads = mapper.attention.num_heads
    out = [
        (qh @ kh.T / (D // heads) ** 0.5).softmax(-1) @ vh
        for qh, kh, vh in zip(q.chunk(heads, 1), k.chunk(heads, 1), v.chunk(heads, 1), strict=True)
    ]
    return B + torch.cat(out, 1) @ w["attention.out_proj.weight"].T


def test_mapper_agrees_with_a_loop():
    for T in (4, 9):  # within the learned places, and stretched
        tokens = clip(T)
        method = trained(create("vq_hash", num_codes=5, **MAPPER))
        out, book = method(tokens), create("vq_hash", num_codes=5)(tokens)
        for i in range(2):
            n = int(book.mask[i].sum()) if book.mask is not None else book.num_kept
            want = naive_mapper(method.hash_mapper, book.x[i, :n], book.assignment[i], tokens.position[i], (T, 3, 5))
            torch.testing.assert_close(out.x[i, :n].double(), want, rtol=1e-4, atol=1e-4)
            assert (out.x[i, :n] - book.x[i, :n]).abs().max() > 0.1


def test_mapper_rows_permute_with_the_codes():
    mapper = trained(HashMapper(16, 6, 5, 4, 0))
    tokens = clip(B=1)
    hashed = TokenHash.of(create("vq_hash", num_codes=6)(tokens).assignment)
    book = torch.randn(1, hashed.anchor.shape[1], 16, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(book.shape[1], generator=torch.Generator().manual_seed(2))
    other = hashed._replace(assignment=order.argsort()[hashed.assignment])
    out, permuted = mapper(book, hashed, tokens.position, (4, 3, 5)), mapper(book[:, order], other, tokens.position, (4, 3, 5))
    torch.testing.assert_close(permuted, out[:, order], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(permuted, out, atol=1e-2)


def test_the_mapper_reads_where_codes_stand():
    tokens, method = clip(B=1), trained(create("vq_hash", num_codes=6, **MAPPER))
    backwards = Tokens.of(tokens.x.flip(1), tokens.layout)
    book, other = create("vq_hash", num_codes=6), method(backwards)
    a, b = book(tokens).x[0], book(backwards).x[0]
    match = torch.cdist(a, b).argmin(1)
    torch.testing.assert_close(a, b[match], rtol=1e-5, atol=1e-5)  # the codewords do not tell the order of the frames
    assert (method(tokens).x[0] - other.x[0][match]).abs().max() > 0.05


def test_the_mapper_tells_a_way_from_the_way_back():
    mapper = trained(HashMapper(16, 6, 5, 4, 0))
    moves = []
    for way in (range(4), range(3, -1, -1)):
        labels = torch.zeros(1, 4, 1, 4, dtype=torch.long)
        for t, w in enumerate(way):
            labels[0, t, 0, w] = 1
        tokens = Tokens.of(torch.zeros(16, 1), Layout("video", (4, 1, 4)))
        hashed = TokenHash.of(labels.flatten(1))
        code = int(hashed.assignment.view(4, 4)[0, way[0]])
        moves.append((mapper(torch.ones(1, 2, 16), hashed, tokens.position, (4, 1, 4)), tokens.position, hashed, code))
    tables = [p[:n] for p, n in zip(mapper.places, (4, 1, 4), strict=True)]
    there, back = (place_summary(h, p, tables)[0, code] for _, p, h, code in moves)
    torch.testing.assert_close(there, back)  # the mean place is the same
    assert (moves[0][0][0, moves[0][3]] - moves[1][0][0, moves[1][3]]).abs().max() > 1e-3


def test_save_and_load(tmp_path):
    method = trained(create("vq_hash", num_codes=5, **MAPPER))
    save_pretrained(method, tmp_path)
    again = from_pretrained(tmp_path)
    tokens = clip()
    assert again.config() == method.config() and torch.equal(again(tokens).x, method(tokens).x)
    assert len(list(again.parameters())) == 3 + 4 + 2


def test_mapper_refuses_other_tokens():
    method = create("vq_hash", num_codes=5, **MAPPER)
    with pytest.raises(ValueError, match="width must be that of the tokens, 8, got 16"):
        method(clip(D=8))
    tokens = clip()
    outside = Tokens(tokens.x, tokens.position + 3, tokens.group, tokens.size, tokens.layout)
    with pytest.raises(ValueError, match="position must lie on the item's grid"):
        method(outside)


# gradients


def test_gradient_is_one_over_n():
    tokens = clip(B=1)
    x = tokens.x.clone().requires_grad_()
    out = create("vq_hash", num_codes=6)(Tokens.of(x, tokens.layout))
    weight = torch.randn(out.x.shape, generator=torch.Generator().manual_seed(0))
    (out.x * weight).sum().backward()
    want = weight[0][out.assignment[0]] / out.size[0][out.assignment[0]][:, None]
    torch.testing.assert_close(x.grad[0], want)


@pytest.mark.parametrize("codebook", ["raw", "normalised"])
def test_gradcheck(codebook):
    fields = {**MAPPER, "width": 4, "num_heads": 2}
    method = trained(create("vq_hash", num_codes=3, codebook=codebook, **fields).double())
    tokens = clip(2, 2, 2, D=4, B=2, dtype=torch.float64)
    names = [n for n, _ in method.named_parameters()]

    def run(x, *parameters):
        inputs = Tokens(x, tokens.position, tokens.group, tokens.size, tokens.layout)
        return torch.func.functional_call(method, dict(zip(names, parameters, strict=True)), (inputs,)).x

    torch.autograd.gradcheck(run, (tokens.x.clone().requires_grad_(), *method.parameters()))


# the contract at settings that are not the defaults: the synthetic items there have 32 tokens, as many as the default codes


VARIANTS = {
    "few": {"num_codes": 6},
    "ratio": {"num_codes": None, "keep_ratio": 0.2},
    "adaptive": {"adaptive": True, "k_min": 2, "k_max": 9},
    "silhouette": {"adaptive": True, "k_min": 2, "k_max": 6, "rule": "silhouette"},
    "official": {"mode": "official", "num_codes": 7},
    "reseed": {"num_codes": 9, "reseed_empty": True},
    "mapper": {"num_codes": 6, **MAPPER},
}
CONTRACT = [
    "valid_and_untouched", "alone_as_in_a_batch", "same_input_same_result", "degenerate_tokens", "half_precision", "gradients",
    "device", "compiled_equals_eager",
]  # fmt: skip


@pytest.mark.parametrize("check", CONTRACT)
@pytest.mark.parametrize("variant", VARIANTS)
def test_contract_of_variants(monkeypatch, variant, check):
    made = partial(create, **VARIANTS[variant])
    monkeypatch.setattr(test_contract, "create", lambda name: trained(made(name)))
    function = getattr(test_contract, f"test_{check}")
    for dtype in (torch.float16, torch.bfloat16) if check == "half_precision" else (None,):
        function("vq_hash", *([] if dtype is None else [dtype]))
