"""Every loss again, as a slow loop over Python floats, written from the definition and not from the library."""

import math

import torch
from torch import Tensor


def plain(tensor: Tensor):
    """The tensor as nested lists of Python numbers."""
    return tensor.detach().tolist()


def vectors(rows: Tensor):
    """Rows (B, R, *input) as lists of lists of lists of floats (B, R, D)."""
    return [[plain(row.reshape(-1)) for row in sample] for sample in rows.detach()]


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def minus(a, b):
    return [x - y for x, y in zip(a, b, strict=True)]


def norm(a):
    return math.sqrt(dot(a, a))


def answer(numbers) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def log_softmax(z):
    top = max(z)
    total = math.fsum(math.exp(x - top) for x in z)
    return [x - top - math.log(total) for x in z]


def weights(labels: Tensor, classes: int):
    """Labels as one probability for each class."""
    if labels.is_floating_point():
        return plain(labels)
    return [[1.0 if i == label else 0.0 for i in range(classes)] for label in plain(labels)]


def squared_error(student, teacher):
    totals = []
    for s, t in zip(student.detach(), teacher.detach(), strict=True):
        difference = minus(plain(s.reshape(-1)), plain(t.reshape(-1)))
        totals.append(dot(difference, difference))
    return answer(totals)


def cross_entropy(logits, labels):
    targets = weights(labels, logits.shape[1])
    return answer([-dot(y, log_softmax(z)) for z, y in zip(plain(logits), targets, strict=True)])


def hinton_kl(student, teacher, temperature=1.0):
    totals = []
    for s, t in zip(plain(student), plain(teacher), strict=True):
        log_q = log_softmax([x / temperature for x in s])
        log_p = log_softmax([x / temperature for x in t])
        kl = math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True))
        totals.append(temperature * temperature * kl)
    return answer(totals)


def agreement(student, teacher):
    pairs = zip(plain(student), plain(teacher), strict=True)
    return answer([1.0 if s.index(max(s)) == t.index(max(t)) else 0.0 for s, t in pairs])


def relative_error(student, teacher, eps=1e-6):
    totals = []
    for s_rows, t_rows in zip(vectors(student), vectors(teacher), strict=True):
        error = math.fsum(norm(minus(s, t)) ** 2 for s, t in zip(s_rows, t_rows, strict=True))
        totals.append(error / (math.fsum(dot(t, t) for t in t_rows) + eps))
    return answer(totals)


def bounded_error(student, teacher, eps=1e-6):
    relative = relative_error(student, teacher, eps)
    return relative / (1 + relative)


def normalized_error(student, teacher, eps=1e-8):
    totals = []
    for s_rows, t_rows in zip(vectors(student), vectors(teacher), strict=True):
        total = 0.0
        for s, t in zip(s_rows, t_rows, strict=True):
            cosine = (dot(s, t) + eps) / math.sqrt((dot(s, s) + eps) * (dot(t, t) + eps))
            total += 2 * (1 - cosine)
        totals.append(total / len(s_rows))
    return answer(totals)


def direction_and_magnitude(student, teacher, eps=1e-8):
    directions, magnitudes = [], []
    for s_rows, t_rows in zip(vectors(student), vectors(teacher), strict=True):
        direction = magnitude = 0.0
        for s, t in zip(s_rows, t_rows, strict=True):
            norm_s, norm_t = math.sqrt(dot(s, s) + eps), math.sqrt(dot(t, t) + eps)
            direction += 2 * (norm_s * norm_t - dot(s, t) - eps)
            magnitude += (norm_s - norm_t) ** 2
        directions.append(direction)
        magnitudes.append(magnitude)
    return answer(directions), answer(magnitudes)


def fisher(student, teacher, probabilities):
    totals = []
    for s_rows, t_rows, p in zip(vectors(student), vectors(teacher), plain(probabilities), strict=True):
        totals.append(math.fsum(p[i] * norm(minus(s_rows[i], t_rows[i])) ** 2 for i in range(len(p))))
    return answer(totals)


def paper_cross_entropy(student, teacher, student_probabilities):
    totals = []
    for dq, dp, q in zip(vectors(student), vectors(teacher), plain(student_probabilities), strict=True):
        totals.append(-math.fsum(dot(dp[i], dq[i]) / q[i] for i in range(len(q))))
    return answer(totals)


def squared_norm(rows):
    return answer([math.fsum(dot(row, row) for row in sample) for sample in vectors(rows)])


def hoffman(rows, outputs):
    return answer([math.fsum(outputs * dot(row, row) / 2 for row in sample) / len(sample) for sample in vectors(rows)])


def paper_label_squared(rows, sigma):
    return answer([math.fsum(sigma**2 * dot(row, row) for row in sample) for sample in vectors(rows)])


def paper_label_cross_entropy(probability_rows, probabilities, labels, sigma):
    totals = []
    y_all = weights(labels, probabilities.shape[1])
    for dq, q, y in zip(vectors(probability_rows), plain(probabilities), y_all, strict=True):
        totals.append(sigma**2 * math.fsum(y[i] * dot(dq[i], dq[i]) / q[i] ** 2 for i in range(len(q))))
    return answer(totals)


def label_cross_entropy(probability_rows, probabilities, laplacians, labels, sigma):
    totals = []
    y_all = weights(labels, probabilities.shape[1])
    for dq, q, lap, y in zip(vectors(probability_rows), plain(probabilities), plain(laplacians), y_all, strict=True):
        second = math.fsum(y[i] * (dot(dq[i], dq[i]) / q[i] ** 2 - lap[i] / q[i]) for i in range(len(q)))
        totals.append(sigma**2 / 2 * second)
    return answer(totals)


def piecewise_linear_cross_entropy(logit_rows, probabilities, sigma):
    totals = []
    for dz, q in zip(vectors(logit_rows), plain(probabilities), strict=True):
        mean = [math.fsum(q[j] * dz[j][d] for j in range(len(q))) for d in range(len(dz[0]))]
        totals.append(sigma**2 / 2 * math.fsum(q[i] * norm(minus(dz[i], mean)) ** 2 for i in range(len(q))))
    return answer(totals)


def noise_distillation(student, teacher):
    s, t = plain(student), plain(teacher)
    draws = range(len(s))
    return answer([math.fsum(norm(minus(s[n][b], t[n][b])) ** 2 for n in draws) / len(s) for b in range(len(s[0]))])


def centered_variance(student, teacher):
    s, t = plain(student), plain(teacher)
    draws, totals = len(s), []
    for b in range(len(s[0])):
        total = 0.0
        for i in range(len(s[0][0])):
            deltas = [s[n][b][i] - t[n][b][i] for n in range(draws)]
            mean = math.fsum(deltas) / draws
            total += math.fsum((delta - mean) ** 2 for delta in deltas) / (draws - 1)
        totals.append(total)
    return answer(totals)


def antithetic(student_plus, teacher_plus, student_minus, teacher_minus):
    sp, tp, sm, tm = map(plain, (student_plus, teacher_plus, student_minus, teacher_minus))
    totals = []
    for b in range(len(sp[0])):
        total = 0.0
        for n in range(len(sp)):
            for i in range(len(sp[0][0])):
                total += ((sp[n][b][i] - tp[n][b][i] - (sm[n][b][i] - tm[n][b][i])) / 2) ** 2
        totals.append(total / len(sp))
    return answer(totals)


def attention_map(features, p=2.0):
    maps = []
    for sample in plain(features):
        height, width = len(sample[0]), len(sample[0][0])
        maps.append(
            [[math.fsum(abs(channel[i][j]) ** p for channel in sample) for j in range(width)] for i in range(height)]
        )
    return answer(maps)


def windows(size: int, parts: int):
    """Adaptive windows: part k runs from ⌊k·size/parts⌋ to ⌈(k+1)·size/parts⌉."""
    return [range(k * size // parts, -((-(k + 1) * size) // parts)) for k in range(parts)]


def match_sizes(student_map, teacher_map):
    height = min(student_map.shape[1], teacher_map.shape[1])
    width = min(student_map.shape[2], teacher_map.shape[2])
    results = []
    for maps in (student_map, teacher_map):
        rows, columns = windows(maps.shape[1], height), windows(maps.shape[2], width)
        results.append(
            answer(
                [
                    [[math.fsum(a[i][j] for i in r for j in c) / (len(r) * len(c)) for c in columns] for r in rows]
                    for a in plain(maps)
                ]
            )
        )
    return tuple(results)


def attention_transfer(student_map, teacher_map, eps=1e-8):
    return normalized_error(student_map.unsqueeze(1), teacher_map.unsqueeze(1), eps)
