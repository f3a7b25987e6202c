// What is done to one row at a time: norms, rotation, activations, exponentials. Included after vectors.inl.

namespace llmctl {
namespace {

// The sum of a[i] * b[i] in 16 interleaved partial sums, which are then added pairwise.
float dot(const float* a, const float* b, int count) {
    Vec sums[kParts];
    for (int p = 0; p < kParts; ++p) sums[p] = splat(0.0f);
    int i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int p = 0; p < kParts; ++p) sums[p] = fma(load(a + i + p * kWidth), load(b + i + p * kWidth), sums[p]);
    float sum = lanes_sum(sums);
    for (; i < count; ++i) sum += a[i] * b[i];
    return sum;
}

float sum_of(const float* a, int count) {
    Vec sums[kParts];
    for (int p = 0; p < kParts; ++p) sums[p] = splat(0.0f);
    int i = 0;
    for (; i + kLanes <= count; i += kLanes)
        for (int p = 0; p < kParts; ++p) sums[p] += load(a + i + p * kWidth);
    float sum = lanes_sum(sums);
    for (; i < count; ++i) sum += a[i];
    return sum;
}

void rms_norm(const float* x, const float* weight, float* y, int count, float eps) {
    const float scale = 1.0f / sqrtf(dot(x, x, count) / static_cast<float>(count) + eps);
    for (int i = 0; i < count; ++i) y[i] = x[i] * scale * weight[i];
}

void layer_norm(const float* x, const float* weight, const float* bias, float* y, int count, float eps) {
    const float mean = sum_of(x, count) / static_cast<float>(count);
    for (int i = 0; i < count; ++i) y[i] = x[i] - mean;
    const float scale = 1.0f / sqrtf(dot(y, y, count) / static_cast<float>(count) + eps);
    for (int i = 0; i < count; ++i) y[i] = y[i] * scale * weight[i];
    if (bias)
        for (int i = 0; i < count; ++i) y[i] += bias[i];
}

// The pairs (i, i + half) of one head turned by their angles.
void rotate(float* head, const float* cosines, const float* sines, int half) {
    for (int i = 0; i < half; ++i) {
        const float first = head[i], second = head[i + half];
        head[i] = first * cosines[i] - second * sines[i];
        head[i + half] = second * cosines[i] + first * sines[i];
    }
}

INLINE Vec activated(Vec x, int activation) {
    const Vec one = splat(1.0f);
    if (activation == kSilu) return x / (one + exp_of(-x));
    if (activation == kRelu) return x < splat(0.0f) ? splat(0.0f) : x;
    if (activation == kGeluTanh) {  // 0.5 x (1 + tanh(u)) = x / (1 + exp(-2 u))
        const Vec u = splat(0.7978845608f) * fma(splat(0.044715f) * x * x, x, x);
        return x / (one + exp_of(splat(-2.0f) * u));
    }
    float lanes[kWidth];
    store(lanes, x);
    for (int i = 0; i < kWidth; ++i) lanes[i] = 0.5f * lanes[i] * (1.0f + erff(lanes[i] * 0.70710678f));
    return load(lanes);
}

// y = act(y), or y = act(y) * other. `count` is a multiple of 16.
void activate(float* y, const float* other, int count, int activation) {
    for (int i = 0; i < count; i += kWidth) {
        const Vec v = activated(load(y + i), activation);
        store(y + i, other ? v * load(other + i) : v);
    }
}

void soft_cap(float* x, int count, float cap) {
    for (int i = 0; i < count; ++i) x[i] = cap * tanhf(x[i] / cap);
}

// scores -> exp(score - largest), the largest returned in `largest`; returns their sum.
float exponentials(float* scores, int count, float* largest_out) {
    float largest = scores[0];
    int i = 0;
    if (count >= kWidth) {
        Vec most = load(scores);
        for (i = kWidth; i + kWidth <= count; i += kWidth) {
            const Vec v = load(scores + i);
            most = v > most ? v : most;
        }
        float lanes[kWidth];
        store(lanes, most);
        for (int j = 0; j < kWidth; ++j) largest = lanes[j] > largest ? lanes[j] : largest;
    }
    for (; i < count; ++i) largest = scores[i] > largest ? scores[i] : largest;
    const Vec shift = splat(largest);
    Vec sums[kParts];
    for (int p = 0; p < kParts; ++p) sums[p] = splat(0.0f);
    for (i = 0; i + kLanes <= count; i += kLanes)
        for (int p = 0; p < kParts; ++p) {
            const Vec v = exp_of(load(scores + i + p * kWidth) - shift);
            store(scores + i + p * kWidth, v);
            sums[p] += v;
        }
    float sum = lanes_sum(sums);
    for (; i < count; ++i) {
        scores[i] = exp_of(scores[i] - largest);
        sum += scores[i];
    }
    *largest_out = largest;
    return sum;
}

}  // namespace
}  // namespace llmctl
