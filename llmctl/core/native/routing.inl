// Which experts each token goes to. Included after rows.inl.

namespace llmctl {
namespace {

// The experts of one token: the `num_active` most likely by a softmax over its `logits` (E,), which are used up, into `chosen`,
// and their probabilities into `shares`, divided by their sum if they are to be. Of equals the first; none twice, NaN or not.
void route(float* logits, int num_experts, int num_active, bool normalised, int32_t* chosen, float* shares) {
    constexpr float kTaken = -1.0f;
    float largest, total = 0.0f;
    const float sum = exponentials(logits, num_experts, &largest);
    for (int j = 0; j < num_active; ++j) {
        int best = -1;
        for (int e = 0; e < num_experts; ++e)
            if (logits[e] != kTaken && (best < 0 || logits[e] > logits[best])) best = e;
        chosen[j] = best;
        shares[j] = logits[best] / sum;
        total += shares[j];
        logits[best] = kTaken;
    }
    if (!normalised) return;
    for (int j = 0; j < num_active; ++j) shares[j] /= total;
}

// The pairs of a token and an expert of it, expert by expert, and those of one expert by token.
struct Groups {
    int32_t* starts;  // (E + 1,): the pairs of expert e are starts[e] <= p < starts[e + 1]
    int32_t* tokens;  // (M k,)
    float* shares;    // (M k,)

    int rows(int expert) const { return starts[expert + 1] - starts[expert]; }
};

// Groups in memory of grouping_numbers, from what `route` gave for each token.
Groups grouped(const int32_t* chosen, const float* shares, int num_tokens, const Model& model, int32_t* memory) {
    const int num_experts = model.num_experts, num_active = model.num_active_experts, num_pairs = num_tokens * num_active;
    const Groups groups{memory, memory + num_experts + 1, reinterpret_cast<float*>(memory + num_experts + 1 + num_pairs)};
    memset(groups.starts, 0, sizeof(int32_t) * (num_experts + 1));
    for (int pair = 0; pair < num_pairs; ++pair) ++groups.starts[chosen[pair] + 1];
    for (int e = 0; e < num_experts; ++e) groups.starts[e + 1] += groups.starts[e];
    for (int pair = 0; pair < num_pairs; ++pair) {  // a start moves on to the next expert's
        const int at = groups.starts[chosen[pair]]++;
        groups.tokens[at] = pair / num_active;
        groups.shares[at] = shares[pair];
    }
    for (int e = num_experts; e > 0; --e) groups.starts[e] = groups.starts[e - 1];
    groups.starts[0] = 0;
    return groups;
}

}  // namespace
}  // namespace llmctl
