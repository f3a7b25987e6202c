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
            if (layer.experts)
                routed_mlp(layer);
            else
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
        const bool is_long = step_.is_long && step_.is_long[t];
        const float *cosines = is_long ? step_.long_cosines : step_.cosines, *sines = is_long ? step_.long_sines : step_.sines;
        if (layer.rotates == 1) rotate(head, cosines + angle, sines + angle, half);
        if (layer.rotates == 2) rotate(head, step_.local_cosines + angle, step_.local_sines + angle, half);
        if (index >= num_heads) attention.remember_key(t, index - num_heads, head);
    }

    // each(run) for the runs of tokens of one text, of no more than `most` tokens.
    template <typename Do>
    void runs(int most, Do each) const {
        for (int first = 0, last; first < num_tokens_; first = last) {
            for (last = first + 1; last < num_tokens_ && last - first < most && follows(last); ++last) {
            }
            each(Run{first, last});
        }
    }

    // All threads take their turns over the runs of tokens and their heads, or over these and the blocks of keys they see.
    void attend(const Attention& attention) const {
        const int sharing = model_.num_heads / model_.num_kv_heads;
        const int most_tokens = sharing >= kMaxTileRows ? 1 : kMaxTileRows / sharing;
        float* area = scratch_.attention + thread_ * scratch_.attention_stride;
        int64_t key_blocks = 0;
        for (int t = 0; t < num_tokens_; ++t) {
            const int64_t seen = attention.num_key_blocks(t);
            key_blocks = seen > key_blocks ? seen : key_blocks;
        }
        const bool splits = splits_keys(model_, num_tokens_, key_blocks, chunk_.num_threads);
        // queries that share a key-value head go together, unless that would leave threads idle
        const bool apart = !splits && num_tokens_ * model_.num_kv_heads < 4 * chunk_.num_threads && chunk_.num_threads > 1;
        const int most_heads = apart ? 1 : sharing < kMaxTileRows ? sharing : kMaxTileRows;
        const Partials partials{scratch_.partials, scratch_.partial_blocks};
        int item = 0;
        runs(most_tokens, [&](Run run) {
            const int64_t begin = attention.first_block(run.first), seen = attention.num_key_blocks(run.last - 1);
            const int64_t count = attention.first_block(run.last - 1) - begin + seen;
            for (int kv_head = 0; kv_head < model_.num_kv_heads; ++kv_head)
                for (int from = 0; from < sharing; from += most_heads) {
                    const int to = from + most_heads < sharing ? from + most_heads : sharing;
                    const int first = kv_head * sharing + from, last = kv_head * sharing + to;
                    for (int64_t block = 0; splits && block < count; ++block)
                        if (item++ % chunk_.num_threads == thread_)
                            attention.attend_block(run, kv_head, first, last, begin + block, scratch_.qkv, scratch_.qkv_stride, partials, area);
                    if (!splits && item++ % chunk_.num_threads == thread_)
                        attention.attend(run, kv_head, first, last, scratch_.qkv, scratch_.qkv_stride, scratch_.attended,
                                         scratch_.attended_stride, area);
                }
        });
        if (!splits) return;
        wait();
        const Range rows = share(num_tokens_ * model_.num_heads, thread_, chunk_.num_threads);
        for (int i = rows.first; i < rows.last; ++i)
            attention.merge_partials(i / model_.num_heads, i % model_.num_heads, partials, scratch_.attended, scratch_.attended_stride, area);
    }

    // Whether token t goes on where the one before it ended.
    bool follows(int t) const { return step_.slots[t] == step_.slots[t - 1] && step_.positions[t] == step_.positions[t - 1] + 1; }

    // How rows are rounded that enter an mlp: one of two matrices may be quantised and the other hold floats, but of quantised
    // models nothing is held in bf16.
    Rounding rounding_into(const Mlp& mlp) const {
        return model_.gated_mlp && rounding(mlp.gate) != kAsTheyAre ? rounding(mlp.gate) : rounding(mlp.up);
    }

    // The groups first <= g < last, of 32 columns, of what lies between an mlp's matrices, for `rows` rows from the norms to the
    // codes, a few groups at a time. The rows begin at `at` in the scratch memory, rows of `stride` numbers.
    void inner(const Mlp& mlp, const Inputs& inputs, int rows, Range groups, size_t at, size_t stride, const QuantRows& rounded) const {
        const int size = mlp.up.outputs, all_blocks = num_blocks(size);
        float *up = scratch_.up + at, *gate = scratch_.gate + at, *result = model_.gated_mlp ? gate : up;
        for (int group = groups.first; group < groups.last; group += kGroup / 2) {
            const int stop = group + kGroup / 2 < groups.last ? group + kGroup / 2 : groups.last;
            const int first = 2 * group, last = 2 * stop < all_blocks ? 2 * stop : all_blocks;
            product(mlp.up, first, last, inputs, rows, {up, stride, nullptr, 0, false, 1.0f, false});
            if (model_.gated_mlp) product(mlp.gate, first, last, inputs, rows, {gate, stride, nullptr, 0, false, 1.0f, false});
            for (int row = 0; row < rows; ++row) {
                const size_t from = row * stride + static_cast<size_t>(first) * kLanes;
                activate(result + from, model_.gated_mlp ? up + from : nullptr, (last - first) * kLanes, model_.activation);
                prepare_groups(rounding(mlp.down), result + row * stride, size, group, stop, rounded, row);
            }
        }
    }

    void mlp(const Layer& layer) const {
        const Inputs inputs = norms(num_tokens_, rounding_into(layer.mlp), layer.mlp_norm, layer.mlp_norm_bias, [](int row) { return row; });
        const QuantRows rounded = quant_rows(scratch_.mlp_quantised, num_tokens_, model_.mlp_size);
        const size_t stride = scratch_.mlp_stride;
        // a thread computes whole groups of columns and waits for nobody
        inner(layer.mlp, inputs, num_tokens_, share(num_groups(model_.mlp_size), thread_, chunk_.num_threads), 0, stride, rounded);
        wait();
        if (model_.parallel_residual) add_branch(nullptr, nullptr);  // attention's part, now that nobody reads what it read
        const Inputs between{model_.gated_mlp ? scratch_.gate : scratch_.up, stride, rounded, chunk_.bf16_dots};
        multiply(layer.mlp.down, between, added(!layer.mlp_post_norm));
        wait();
        if (layer.mlp_post_norm) add_branch(layer.mlp_post_norm, layer.mlp_post_norm_bias);
    }

    // An mlp of experts. Tokens of one expert go through it together, and one that no token chose is not touched. What a token
    // gets is added up in the order of its experts' numbers, whoever computed it and whatever else those experts worked on.
    void routed_mlp(const Layer& layer) const {
        Rounding outer = rounding(layer.router);
        for (int e = 0; e < model_.num_experts && outer == kAsTheyAre; ++e) outer = rounding_into(layer.experts[e]);
        const Inputs inputs = norms(num_tokens_, outer, layer.mlp_norm, layer.mlp_norm_bias, [](int row) { return row; });
        const Groups groups = routes(layer, inputs);
        share_experts(groups, num_groups(model_.expert_size), [&](int e, Range columns) {
            const Inputs rows = entering(inputs, layer.experts[e], groups, e);
            inner(layer.experts[e], rows, groups.rows(e), columns, groups.starts[e] * scratch_.expert_stride, scratch_.expert_stride,
                  expert_codes(groups, e));
        });
        wait();
        if (model_.parallel_residual) add_branch(nullptr, nullptr);
        add_experts(layer, groups);
        wait();
        if (layer.mlp_post_norm) add_branch(layer.mlp_post_norm, layer.mlp_post_norm_bias);
    }

    Groups routes(const Layer& layer, const Inputs& inputs) const {
        const size_t stride = scratch_.router_stride, active = static_cast<size_t>(model_.num_active_experts);
        float *logits = scratch_.router + own_area_ * stride, *shares = scratch_.shares + own_area_ * active;
        int32_t* chosen = scratch_.chosen + own_area_ * active;
        const int blocks = num_blocks(model_.num_experts);
        const Range own = few_ ? Range{0, blocks} : share(blocks, thread_, chunk_.num_threads);
        product(layer.router, own.first, own.last, inputs, num_tokens_, {logits, stride, nullptr, 0, false, 1.0f, false});
        if (!few_) wait();
        prepare(num_tokens_, [&](int t) {
            route(logits + t * stride, model_.num_experts, model_.num_active_experts, model_.normalised_experts, chosen + t * active,
                  shares + t * active);
        });
        const size_t tokens = static_cast<size_t>(num_tokens_);
        return grouped(chosen, shares, num_tokens_, model_, scratch_.grouping + thread_ * grouping_numbers(model_, tokens));
    }

    // Work of so many pieces for each expert that has rows: each(expert, this thread's pieces).
    template <typename Do>
    void share_experts(const Groups& groups, int pieces, Do each) const {
        // of one piece: about 3 rows' time goes into reading the weights
        const auto cost = [&](int e) { return groups.rows(e) ? static_cast<int64_t>(groups.rows(e)) + 3 : 0; };
        int64_t total = 0, before = 0;
        for (int e = 0; e < model_.num_experts; ++e) total += cost(e) * pieces;
        const int64_t begin = total * thread_ / chunk_.num_threads, end = total * (thread_ + 1) / chunk_.num_threads;
        for (int e = 0; e < model_.num_experts && before < end; ++e) {
            if (!groups.rows(e)) continue;
            const auto piece_at = [&](int64_t place) {  // the first piece that begins there or later
                const int64_t piece = place <= before ? 0 : (place - before + cost(e) - 1) / cost(e);
                return static_cast<int>(piece < pieces ? piece : pieces);
            };
            const Range own{piece_at(begin), piece_at(end)};
            if (own.first < own.last) each(e, own);
            before += cost(e) * pieces;
        }
    }

    // The rows of an expert's tokens side by side, in this thread's memory.
    Inputs entering(const Inputs& inputs, const Mlp& expert, const Groups& groups, int e) const {
        const int rows = groups.rows(e);
        const Rounding rounding = rounding_into(expert);
        if (rows == num_tokens_) return inputs;  // all of them, in order
        const size_t stride = scratch_.hidden_stride, area = static_cast<size_t>(thread_) * num_tokens_ * stride;
        float* to = scratch_.gathered + area;
        char* codes = reinterpret_cast<char*>(scratch_.gathered_quantised) + area / kQuantGroup * kQuantBytes;
        const Inputs gathered{to, stride, quant_rows(codes, rows, model_.hidden_size), inputs.bf16_dots};
        for (int row = 0; row < rows; ++row) {
            memcpy(to + row * stride, inputs.x + groups.tokens[groups.starts[e] + row] * inputs.stride, sizeof(float) * model_.hidden_size);
            prepare_row(rounding, to + row * stride, model_.hidden_size, gathered.quantised, row);
        }
        return gathered;
    }

    // Where the rounded rows between the matrices of an expert lie.
    QuantRows expert_codes(const Groups& groups, int e) const {
        const size_t bytes = scratch_.expert_stride / kQuantGroup * kQuantBytes;
        return quant_rows(reinterpret_cast<char*>(scratch_.mlp_quantised) + groups.starts[e] * bytes, groups.rows(e), model_.expert_size);
    }

    // This thread's columns of what the experts give, weighted, onto the hidden state, or into the branch where a norm follows.
    void add_experts(const Layer& layer, const Groups& groups) const {
        const Range blocks = share(num_blocks(model_.hidden_size), thread_, chunk_.num_threads);
        if (blocks.first == blocks.last) return;
        const size_t stride = scratch_.hidden_stride, first = static_cast<size_t>(blocks.first) * kLanes;
        const int left = model_.hidden_size - static_cast<int>(first), own = (blocks.last - blocks.first) * kLanes;
        const int count = own < left ? own : left;
        float* sums = scratch_.branch + first;
        for (int t = 0; t < num_tokens_; ++t) memset(sums + t * stride, 0, sizeof(float) * count);
        const float* inner = model_.gated_mlp ? scratch_.gate : scratch_.up;
        for (int e = 0; e < model_.num_experts; ++e) {
            const int rows = groups.rows(e), start = groups.starts[e];
            if (!rows) continue;
            const Inputs inputs{inner + start * scratch_.expert_stride, scratch_.expert_stride, expert_codes(groups, e), chunk_.bf16_dots};
            product(layer.experts[e].down, blocks.first, blocks.last, inputs, rows,
                    {scratch_.expert_rows, stride, nullptr, 0, false, 1.0f, false});
            for (int row = 0; row < rows; ++row) {
                const float *x = scratch_.expert_rows + row * stride + first, weight = groups.shares[start + row];
                float* y = sums + groups.tokens[start + row] * stride;
                for (int i = 0; i < count; ++i) y[i] += x[i] * weight;
            }
        }
        if (layer.mlp_post_norm) return;
        for (int t = 0; t < num_tokens_; ++t)
            for (int i = 0; i < count; ++i) hidden(t)[first + i] += sums[t * stride + i] * model_.residual_multiplier;
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
