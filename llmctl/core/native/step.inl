// One thread's share of a chunk of tokens, through all layers. Included after attention.inl, once for each instruction set.
//
// Work is divided by tokens (norms), by tokens and heads (rotation, attention) or by blocks of output rows (products). The
// division decides who computes a number and never how, so the number of threads does not show in the results.

namespace llmctl {
namespace {

struct Range {
    int first, last;
};

Range share(int count, int thread, int num_threads) {
    return {static_cast<int>(static_cast<int64_t>(count) * thread / num_threads),
            static_cast<int>(static_cast<int64_t>(count) * (thread + 1) / num_threads)};
}

class Worker {
   public:
    Worker(const Chunk& chunk, int thread)
        : chunk_(chunk),
          model_(*chunk.model),
          step_(*chunk.step),
          scratch_(chunk.scratch),
          num_tokens_(static_cast<int>(chunk.step->num_tokens)),
          thread_(thread),
          few_(num_tokens_ <= kFewTokens),
          tokens_(share(num_tokens_, thread, chunk.num_threads)),
          own_area_(few_ ? thread * kFewTokens : 0) {}

    void run() {
        for (int t = tokens_.first; t < tokens_.last; ++t) embed(t);
        if (few_) wait();
        for (int i = 0; i < model_.num_layers; ++i) {
            const Layer& layer = model_.layers[i];
            attention(layer);
            mlp(layer);
        }
        logits();
    }

   private:
    void wait() const {
        if (chunk_.num_threads > 1) chunk_.barrier(chunk_.pool);
    }

    // What comes before a product, for each of `count` rows. Few rows are prepared by each thread for itself.
    template <typename Do>
    void prepare(int count, Do each) const {
        const Range rows = few_ ? Range{0, count} : share(count, thread_, chunk_.num_threads);
        for (int row = rows.first; row < rows.last; ++row) each(row);
        if (!few_) wait();
    }

    float* hidden(int t) const { return scratch_.hidden + t * scratch_.hidden_stride; }
    float* normed(int t) const { return scratch_.normed + (own_area_ + t) * scratch_.hidden_stride; }
    float* qkv(int t) const { return scratch_.qkv + t * scratch_.qkv_stride; }

    Rounding rounding(const Matrix& matrix) const { return rounding_for(matrix, chunk_.bf16_dots); }

    // The rows that enter products with matrices of so many inputs, rounded: this thread's own where they are few.
    QuantRows quantised(int inputs) const {
        const size_t bytes = static_cast<size_t>(num_groups(inputs)) * kQuantBytes;
        return quant_rows(reinterpret_cast<char*>(scratch_.quantised) + own_area_ * bytes, few_ ? kFewTokens : num_tokens_, inputs);
    }

    void embed(int t) const {
        const size_t size = static_cast<size_t>(model_.hidden_size);
        float* x = hidden(t);
        row_of(model_.embed, static_cast<size_t>(step_.tokens[t]), x);
        if (model_.embedding_multiplier != 1.0f)
            for (size_t i = 0; i < size; ++i) x[i] *= model_.embedding_multiplier;
        if (model_.positions) {
            const float* row = model_.positions + static_cast<size_t>(step_.positions[t]) * size;
            for (size_t i = 0; i < size; ++i) x[i] += row[i];
        }
    }

    // Without a weight there is no norm.
    void norm(const float* x, float* y, const float* weight, const float* bias) const {
        if (!weight)
            for (int i = 0; i < model_.hidden_size; ++i) y[i] = x[i];
        else if (model_.layer_norm)
            layer_norm(x, weight, bias, y, model_.hidden_size, model_.norm_eps);
        else
            rms_norm(x, weight, y, model_.hidden_size, model_.norm_eps);
    }

    // This thread's blocks of matrix * x, for all tokens.
    void multiply(const Matrix& matrix, const Inputs& x, const Target& target) const {
        const Range blocks = share(num_blocks(matrix.outputs), thread_, chunk_.num_threads);
        product(matrix, blocks.first, blocks.last, x, num_tokens_, target);
    }

    // What attention or mlp gives is added to the hidden state by the product itself, unless it is normed first, or must wait
    // because the mlp reads what attention read.
    Target added(bool at_once) const {
        if (at_once) return onto_hidden();
        return {scratch_.branch, scratch_.hidden_stride, nullptr, 0, false, 1.0f, false};
    }

    // Adds this thread's rows of the branch, normed where there is a norm, and waits for the others.
    void add_branch(const float* weight, const float* bias) const {
        for (int t = tokens_.first; t < tokens_.last; ++t) {
            float *x = hidden(t), *y = scratch_.branch + t * scratch_.hidden_stride;
            if (weight) norm(y, y, weight, bias);
            for (int i = 0; i < model_.hidden_size; ++i) x[i] += y[i] * model_.residual_multiplier;
        }
        wait();
    }

    Target onto_hidden() const { return {scratch_.hidden, scratch_.hidden_stride, nullptr, 0, true, model_.residual_multiplier, false}; }

    // Norms of the rows that token_of(row) names, rounded as the next matrices want them.
    template <typename TokenOf>
    Inputs norms(int count, Rounding rounding, const float* weight, const float* bias, TokenOf token_of) const {
        const Inputs inputs{normed(0), scratch_.hidden_stride, quantised(model_.hidden_size), chunk_.bf16_dots};
        prepare(count, [&](int row) {
            norm(hidden(token_of(row)), normed(row), weight, bias);
            prepare_row(rounding, normed(row), model_.hidden_size, inputs.quantised, row);
        });
        return inputs;
    }

    void attention(const Layer& layer) const {
        const Inputs inputs = norms(num_tokens_, rounding(layer.qkv), layer.attn_norm, layer.attn_norm_bias, [](int row) { return row; });
        multiply(layer.qkv, inputs, {scratch_.qkv, scratch_.qkv_stride, nullptr, 0, false, 1.0f, false});
        wait();
        if (model_.whole_qk_norm && layer.q_norm) {
            const int queries = model_.num_heads * model_.head_dim, keys = model_.num_kv_heads * model_.head_dim;
            for (int t = tokens_.first; t < tokens_.last; ++t) {
                rms_norm(qkv(t), layer.q_norm, qkv(t), queries, model_.norm_eps);
                rms_norm(qkv(t) + queries, layer.k_norm, qkv(t) + queries, keys, model_.norm_eps);
            }
            wait();
        }
        const Attention attention(model_, layer, step_);
        const int num_rows = model_.num_heads + 2 * model_.num_kv_heads;  // of one token
        const Range rows = share(num_tokens_ * num_rows, thread_, chunk_.num_threads);
        for (int i = rows.first; i < rows.last; ++i) prepare_head(layer, attention, i / num_rows, i % num_rows);
        wait();
        attend(attention);
        wait();
        const int size = model_.num_heads * model_.head_dim;
        const Inputs attended{scratch_.attended, scratch_.attended_stride, quantised(size), chunk_.bf16_dots};
        const Rounding rounding_out = rounding(layer.out);
        if (rounding_out != kAsTheyAre)
            prepare(num_tokens_, [&](int row) { prepare_row(rounding_out, attended.x + row * attended.stride, size, attended.quantised, row); });
        const bool at_once = !layer.attn_post_norm && !model_.parallel_residual;
        multiply(layer.out, attended, added(at_once));
        wait();
        if (layer.attn_post_norm && !model_.parallel_residual) add_branch(layer.attn_post_norm, layer.attn_post_norm_bias);
    }

    // Row `index` of the token's heads: a query or a key is normed and rotated in place, a key or a value goes into the cache.
    void prepare_head(const Layer& layer, const Attention& attention, int t, int index) const {
        const int size = model_.head_dim, half = model_.rotary_size / 2, num_heads = model_.num_heads;
        float* head = qkv(t) + static_cast<size_t>(index) * size;
        if (index >= num_heads + model_.num_kv_heads) {
            attention.remember_value(t, index - num_heads - model_.num_kv_heads, head);
            return;
        }
        const float* weight = index < num_heads ? layer.q_norm : layer.k_norm;
        if (weight && !model_.whole_qk_norm) rms_norm(head, weight, head, size, model_.norm_eps);
        const size_t angle = static_cast<size_t>(step_.positions[t]) * half;
        if (layer.rotates == 1) rotate(head, step_.cosines + angle, step_.sines + angle, half);
        if (layer.rotates == 2) rotate(head, step_.local_cosines + angle, step_.local_sines + angle, half);
        if (index >= num_heads) attention.remember_key(t, index - num_heads, head);
    }

    // All threads take their turns over the runs of tokens and their heads.
    void attend(const Attention& attention) const {
        const int sharing = model_.num_heads / model_.num_kv_heads;
        const int most_tokens = sharing >= kMaxTileRows ? 1 : kMaxTileRows / sharing;
        // queries that share a key-value head go together, unless that would leave threads idle
        const bool apart = num_tokens_ * model_.num_kv_heads < 4 * chunk_.num_threads && chunk_.num_threads > 1;
        const int most_heads = apart ? 1 : sharing < kMaxTileRows ? sharing : kMaxTileRows;
        int item = 0;
        for (int first = 0, last; first < num_tokens_; first = last) {
            for (last = first + 1; last < num_tokens_ && last - first < most_tokens && follows(last); ++last) {
            }
            for (int kv_head = 0; kv_head < model_.num_kv_heads; ++kv_head)
                for (int head = 0; head < sharing; head += most_heads) {
                    if (item++ % chunk_.num_threads != thread_) continue;
                    const int end = head + most_heads < sharing ? head + most_heads : sharing;
                    attention.attend({first, last}, kv_head, kv_head * sharing + head, kv_head * sharing + end, scratch_.qkv,
                                     scratch_.qkv_stride, scratch_.attended, scratch_.attended_stride,
                                     scratch_.attention + thread_ * scratch_.attention_stride);
                }
        }
    }

    // Whether token t goes on where the one before it ended.
    bool follows(int t) const { return step_.slots[t] == step_.slots[t - 1] && step_.positions[t] == step_.positions[t - 1] + 1; }

    void mlp(const Layer& layer) const {
        // one of two matrices may be quantised and the other hold floats, but of quantised models nothing is held in bf16
        const Rounding outer = model_.gated_mlp && rounding(layer.gate) != kAsTheyAre ? rounding(layer.gate) : rounding(layer.up);
        const Inputs inputs = norms(num_tokens_, outer, layer.mlp_norm, layer.mlp_norm_bias, [](int row) { return row; });
        const QuantRows inner_quantised = quant_rows(scratch_.mlp_quantised, num_tokens_, model_.mlp_size);
        float* inner = model_.gated_mlp ? scratch_.gate : scratch_.up;
        const size_t stride = scratch_.mlp_stride;
        // a thread computes whole groups of 32 columns from the norms to the codes, a few at a time, and waits for nobody
        const int all_blocks = num_blocks(model_.mlp_size), all_groups = num_groups(model_.mlp_size);
        const Range groups = share(all_groups, thread_, chunk_.num_threads);
        for (int group = groups.first; group < groups.last; group += kGroup / 2) {
            const int stop = group + kGroup / 2 < groups.last ? group + kGroup / 2 : groups.last;
            const int first = 2 * group, last = 2 * stop < all_blocks ? 2 * stop : all_blocks;
            product(layer.up, first, last, inputs, num_tokens_, {scratch_.up, stride, nullptr, 0, false, 1.0f, false});
            if (model_.gated_mlp) product(layer.gate, first, last, inputs, num_tokens_, {scratch_.gate, stride, nullptr, 0, false, 1.0f, false});
            for (int t = 0; t < num_tokens_; ++t) {
                const size_t at = t * stride + static_cast<size_t>(first) * kLanes;
                activate(inner + at, model_.gated_mlp ? scratch_.up + at : nullptr, (last - first) * kLanes, model_.activation);
                prepare_groups(rounding(layer.down), inner + t * stride, model_.mlp_size, group, stop, inner_quantised, t);
            }
        }
        wait();
        if (model_.parallel_residual) add_branch(nullptr, nullptr);  // attention's part, now that nobody reads what it read
        multiply(layer.down, {inner, stride, inner_quantised, chunk_.bf16_dots}, added(!layer.mlp_post_norm));
        wait();
        if (layer.mlp_post_norm) add_branch(layer.mlp_post_norm, layer.mlp_post_norm_bias);
    }

    void logits() const {
        int wanted[kChunk], num_wanted = 0;
        for (int t = 0; t < num_tokens_; ++t)
            if (step_.wants_logits[t]) wanted[num_wanted++] = t;
        const Inputs inputs = norms(num_wanted, rounding(model_.head), model_.final_norm, model_.final_norm_bias,
                                    [&](int row) { return wanted[row]; });
        const Range blocks = share(num_blocks(model_.vocab_size), thread_, chunk_.num_threads);
        product(model_.head, blocks.first, blocks.last, inputs, num_wanted,
                {step_.logits, static_cast<size_t>(model_.vocab_size), nullptr, 0, false, 1.0f, false});
        const int first = blocks.first * kLanes;
        const int last = blocks.last * kLanes < model_.vocab_size ? blocks.last * kLanes : model_.vocab_size;
        for (int t = 0; t < num_wanted; ++t) {
            float* row = step_.logits + static_cast<size_t>(t) * model_.vocab_size + first;
            if (model_.logit_multiplier != 1.0f)
                for (int i = 0; i < last - first; ++i) row[i] *= model_.logit_multiplier;
            if (model_.logit_softcap > 0) soft_cap(row, last - first, model_.logit_softcap);
        }
    }

    const Chunk& chunk_;
    const Model& model_;
    const Step& step_;
    const Scratch& scratch_;
    const int num_tokens_, thread_;
    const bool few_;
    const Range tokens_;
    const size_t own_area_;
};

void run_chunk(const Chunk& chunk, int thread) { Worker(chunk, thread).run(); }

void multiply(const Matrix& matrix, int first, int last, const Inputs& x, int rows, float* y, size_t y_stride) {
    product(matrix, first, last, x, rows, {y, y_stride, nullptr, 0, false, 1.0f, false});
}

void prepare(const Matrix& matrix, const Inputs& x, int row) {
    prepare_row(rounding_for(matrix, x.bf16_dots), x.x + row * x.stride, matrix.inputs, x.quantised, row);
}

}  // namespace

const Kernels LLMCTL_KERNELS = {LLMCTL_ISA_NAME, false, run_chunk, prepare, multiply};
#if defined(__AVX512F__)
const Kernels kAvx512Bf16Kernels = {"avx512bf16", true, run_chunk, prepare, multiply};
#endif

}  // namespace llmctl
