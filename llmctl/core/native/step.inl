// One thread's share of a chunk of tokens, through all layers. Included after kernels.inl, once for each instruction set.
//
// Work is divided by tokens (norms, rotation), by tokens and heads (attention) or by blocks of output rows (products). The
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
          tokens_(share(num_tokens_, thread, chunk.num_threads)) {}

    void run() {
        for (int t = tokens_.first; t < tokens_.last; ++t) embed(t);
        for (int i = 0; i < model_.num_layers; ++i) {
            const Layer& layer = model_.layers[i];
            attention(layer);
            mlp(layer);
        }
        logits();
    }

   private:
    void wait() const { chunk_.barrier(chunk_.pool); }

    float* hidden(int t) const { return scratch_.hidden + t * scratch_.hidden_stride; }
    float* normed(int t) const { return scratch_.normed + t * scratch_.hidden_stride; }
    float* qkv(int t) const { return scratch_.qkv + t * scratch_.qkv_stride; }

    void embed(int t) const {
        const size_t size = static_cast<size_t>(model_.hidden_size), token = static_cast<size_t>(step_.tokens[t]);
        float* x = hidden(t);
        if (model_.embed_kind == kFloat32) {
            memcpy(x, static_cast<const float*>(model_.embed) + token * size, size * 4);
        } else if (model_.embed_kind == kInt8) {
            const size_t groups = (size + kQuantGroup - 1) / kQuantGroup;
            const int8_t* codes = static_cast<const int8_t*>(model_.embed) + token * groups * kQuantGroup;
            const float* scales = model_.embed_scales + token * groups;
            for (size_t i = 0; i < size; ++i) x[i] = scales[i / kQuantGroup] * static_cast<float>(codes[i]);
        } else {
            const uint16_t* row = static_cast<const uint16_t*>(model_.embed) + token * size;
            for (size_t i = 0; i < size; ++i) x[i] = from_bf16(row[i]);
        }
        if (model_.embedding_multiplier != 1.0f)
            for (size_t i = 0; i < size; ++i) x[i] *= model_.embedding_multiplier;
        if (model_.positions) {
            const float* row = model_.positions + static_cast<size_t>(step_.positions[t]) * size;
            for (size_t i = 0; i < size; ++i) x[i] += row[i];
        }
    }

    void norm(const float* x, float* y, const float* weight, const float* bias) const {
        if (model_.layer_norm)
            layer_norm(x, weight, bias, y, model_.hidden_size, model_.norm_eps);
        else
            rms_norm(x, weight, y, model_.hidden_size, model_.norm_eps);
    }

    // This thread's blocks of matrix * x, for all tokens.
    void multiply(const Matrix& matrix, const float* x, size_t x_stride, Target target) const {
        const Range blocks = share(num_blocks(matrix.outputs), thread_, chunk_.num_threads);
        product(matrix, blocks.first, blocks.last, x, x_stride, num_tokens_, target);
    }

    void attention(const Layer& layer) const {
        for (int t = tokens_.first; t < tokens_.last; ++t) norm(hidden(t), normed(t), layer.attn_norm, layer.attn_norm_bias);
        wait();
        multiply(layer.qkv, scratch_.normed, scratch_.hidden_stride, {scratch_.qkv, scratch_.qkv_stride, nullptr, 0, false, 1.0f});
        wait();
        for (int t = tokens_.first; t < tokens_.last; ++t) {
            prepare_heads(layer, t);
            remember(layer, t);
        }
        wait();
        const int num_items = num_tokens_ * model_.num_kv_heads;
        for (int item = thread_; item < num_items; item += chunk_.num_threads) attend(layer, item / model_.num_kv_heads, item % model_.num_kv_heads);
        wait();
        multiply(layer.out, scratch_.attended, scratch_.attended_stride,
                 {scratch_.hidden, scratch_.hidden_stride, nullptr, 0, true, model_.residual_multiplier});
        wait();
    }

    // Norm and rotation of the token's query and key heads, in place.
    void prepare_heads(const Layer& layer, int t) const {
        const int size = model_.head_dim, half = model_.rotary_size / 2;
        const size_t angle = static_cast<size_t>(step_.positions[t]) * half;
        for (int h = 0; h < model_.num_heads + model_.num_kv_heads; ++h) {
            float* head = qkv(t) + static_cast<size_t>(h) * size;
            const float* weight = h < model_.num_heads ? layer.q_norm : layer.k_norm;
            if (weight) rms_norm(head, weight, head, size, model_.norm_eps);
            if (layer.rotates) rotate(head, step_.cosines + angle, step_.sines + angle, half);
        }
    }

    float* keys_of(const Layer& layer, int t, int kv_head) const {
        const size_t head = static_cast<size_t>(step_.slots[t]) * model_.num_kv_heads + kv_head;
        return layer.keys + head * model_.cache_capacity * model_.head_dim;
    }

    float* values_of(const Layer& layer, int t, int kv_head) const {
        const size_t head = static_cast<size_t>(step_.slots[t]) * model_.num_kv_heads + kv_head;
        return layer.values + head * model_.cache_capacity * num_blocks(model_.head_dim) * kLanes;
    }

    // The token's keys and values into the cache.
    void remember(const Layer& layer, int t) const {
        const size_t size = static_cast<size_t>(model_.head_dim), position = static_cast<size_t>(step_.positions[t]);
        const size_t capacity = static_cast<size_t>(model_.cache_capacity);
        for (int h = 0; h < model_.num_kv_heads; ++h) {
            const float* key = qkv(t) + (static_cast<size_t>(model_.num_heads) + h) * size;
            const float* value = key + static_cast<size_t>(model_.num_kv_heads) * size;
            float* keys = keys_of(layer, t, h) + position / kLanes * size * kLanes + position % kLanes;
            float* values = values_of(layer, t, h) + position * kLanes;
            for (size_t d = 0; d < size; ++d) keys[d * kLanes] = key[d];
            for (size_t d = 0; d < size; ++d) values[d / kLanes * capacity * kLanes + d % kLanes] = value[d];
        }
    }

    // The query heads of one token that share a key-value head.
    void attend(const Layer& layer, int t, int kv_head) const {
        const int size = model_.head_dim, num_queries = model_.num_heads / model_.num_kv_heads;
        const int64_t position = step_.positions[t];
        const int64_t seen = layer.window && position >= layer.window ? position - layer.window + 1 : 0;  // the first key
        const int64_t first_block = seen / kLanes;
        const int key_blocks = static_cast<int>(position / kLanes + 1 - first_block);
        const int offset = static_cast<int>(seen - first_block * kLanes), count = static_cast<int>(position + 1 - seen);
        const size_t stride = static_cast<size_t>(key_blocks) * kLanes;
        const size_t heads = static_cast<size_t>(kv_head) * num_queries * size;
        float* scores = scratch_.scores + thread_ * scratch_.scores_stride;
        float* sums = scores + num_queries * stride;  // (num_queries,)
        const size_t key_block = static_cast<size_t>(size) * kLanes;
        const char* keys = reinterpret_cast<const char*>(keys_of(layer, t, kv_head) + first_block * key_block);
        product<kFloat32>(Packed{keys, key_block * 4, size}, 0, key_blocks, qkv(t) + heads, size, num_queries,
                          {scores, stride, nullptr, key_blocks * kLanes, false, 1.0f});
        for (int r = 0; r < num_queries; ++r)
            sums[r] = softmax(scores + r * stride + offset, count, model_.attention_scale, model_.attention_softcap);
        const char* values = reinterpret_cast<const char*>(values_of(layer, t, kv_head) + seen * kLanes);
        float* out = scratch_.attended + t * scratch_.attended_stride + heads;
        product<kFloat32>(Packed{values, static_cast<size_t>(model_.cache_capacity) * kLanes * 4, count}, 0, num_blocks(size), scores + offset,
                          stride, num_queries, {out, static_cast<size_t>(size), nullptr, size, false, 1.0f});
        for (int r = 0; r < num_queries; ++r)
            for (int d = 0; d < size; ++d) out[static_cast<size_t>(r) * size + d] *= sums[r];
    }

    void mlp(const Layer& layer) const {
        for (int t = tokens_.first; t < tokens_.last; ++t) norm(hidden(t), normed(t), layer.mlp_norm, layer.mlp_norm_bias);
        wait();
        multiply(layer.up, scratch_.normed, scratch_.hidden_stride, {scratch_.up, scratch_.mlp_stride, nullptr, 0, false, 1.0f});
        if (model_.gated_mlp)
            multiply(layer.gate, scratch_.normed, scratch_.hidden_stride, {scratch_.gate, scratch_.mlp_stride, nullptr, 0, false, 1.0f});
        // the thread's own columns, so nobody is waited for
        const Range blocks = share(num_blocks(model_.mlp_size), thread_, chunk_.num_threads);
        const int end = blocks.last * kLanes < model_.mlp_size ? blocks.last * kLanes : model_.mlp_size;
        const int whole = (end - blocks.first * kLanes + kLanes - 1) / kLanes * kLanes;
        float* inner = model_.gated_mlp ? scratch_.gate : scratch_.up;
        for (int t = 0; t < num_tokens_ && whole > 0; ++t) {
            const size_t at = t * scratch_.mlp_stride + static_cast<size_t>(blocks.first) * kLanes;
            activate(inner + at, model_.gated_mlp ? scratch_.up + at : nullptr, whole, model_.activation);
        }
        wait();
        multiply(layer.down, inner, scratch_.mlp_stride, {scratch_.hidden, scratch_.hidden_stride, nullptr, 0, true, model_.residual_multiplier});
        wait();
    }

    void logits() const {
        int num_wanted = 0;
        for (int t = 0; t < num_tokens_; ++t) {
            if (!step_.wants_logits[t]) continue;
            if (num_wanted % chunk_.num_threads == thread_) norm(hidden(t), normed(num_wanted), model_.final_norm, model_.final_norm_bias);
            ++num_wanted;
        }
        wait();
        const Range blocks = share(num_blocks(model_.vocab_size), thread_, chunk_.num_threads);
        product(model_.head, blocks.first, blocks.last, scratch_.normed, scratch_.hidden_stride, num_wanted,
                {step_.logits, static_cast<size_t>(model_.vocab_size), nullptr, 0, false, 1.0f});
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
    const Range tokens_;
};

void run_chunk(const Chunk& chunk, int thread) { Worker(chunk, thread).run(); }

void multiply(const Matrix& matrix, int first, int last, const float* x, size_t x_stride, int rows, float* y, size_t y_stride) {
    product(matrix, first, last, x, x_stride, rows, {y, y_stride, nullptr, 0, false, 1.0f});
}

}  // namespace

const Kernels LLMCTL_KERNELS = {LLMCTL_ISA_NAME, run_chunk, multiply};

}  // namespace llmctl
