// Attention of the queries of one text over its cache. Included after quantised.inl and rows.inl.
//
// Keys are taken in blocks of 256 that begin at multiples of 256, and each block's softmax stands alone before it is merged
// into those before it (as in FlashAttention, arXiv:2205.14135, and Flash-Decoding). So memory does not grow with the text,
// and a query's numbers depend on its own position only: not on the queries beside it nor on who computed which block.
// Several queries of a prompt go together, since keys and values that were loaded once then serve them all. A few queries over
// many keys go block by block, each to any thread, and are merged when all are there, in the same order: the same bits.

namespace llmctl {
namespace {

// Tokens of one slot at consecutive positions.
struct Run {
    int first, last;
};

// A row as int8 codes and their scale, which is returned. NaN and infinity go into the scale.
float to_codes(const float* x, signed char* codes, int count) {
    uint32_t largest = 0;
    for (int i = 0; i < count; ++i) {
        const uint32_t size = as_bits(x[i]) & 0x7fffffffu;
        largest = size > largest ? size : largest;
    }
    const float size = as_float(largest);
    if (largest >= 0x7f800000u || size < 1e-30f) {
        memset(codes, 0, static_cast<size_t>(count));
        return largest >= 0x7f800000u ? size : 0.0f;
    }
    const float steps = 127.0f / size;
    for (int i = 0; i < count; ++i) codes[i] = static_cast<signed char>(as_bits(x[i] * steps + 12582912.0f) - 0x4b400000u);
    return size / 127.0f;
}

// What each block of keys adds, for each token and head: padded sums of values, the largest score, the sum of exponentials.
struct Partials {
    float* numbers;
    size_t blocks;  // that there is room for, of a token and head
};

class Attention {
   public:
    Attention(const Model& model, const Layer& layer, const Step& step)
        : model_(model),
          layer_(layer),
          step_(step),
          size_(model.head_dim),
          padded_size_(static_cast<size_t>(num_blocks(model.head_dim)) * kLanes) {}

    // Token t's key (rotated) and value of one head, (D,) each, into the cache.
    void remember_key(int t, int kv_head, const float* key) const {
        const size_t position = static_cast<size_t>(step_.positions[t]), size = static_cast<size_t>(size_);
        const size_t at = head_of(t, kv_head) * capacity() * size + position / kLanes * size * kLanes + position % kLanes;
        put_numbers(layer_.keys, layer_.key_scales, t, kv_head, key, [&](int d) { return at + static_cast<size_t>(d) * kLanes; });
    }

    void remember_value(int t, int kv_head, const float* value) const {
        const size_t position = static_cast<size_t>(step_.positions[t]);
        const size_t at = head_of(t, kv_head) * capacity() * padded_size_ + position * kLanes;
        put_numbers(layer_.values, layer_.value_scales, t, kv_head, value,
                    [&](int d) { return at + static_cast<size_t>(d / kLanes) * capacity() * kLanes + d % kLanes; });
    }

    // The query heads first_head <= h < last_head of `run`, which share key-value head `kv_head`. `queries` and `out` hold
    // all heads of the chunk's tokens, one row a token; `area` has attention_floats(model) numbers for this thread. No more
    // than kMaxTileRows tokens times heads.
    void attend(Run run, int kv_head, int first_head, int last_head, const float* queries, size_t query_stride, float* out, size_t out_stride,
                float* area) const {
        const Job job = prepared(run, kv_head, first_head, last_head, queries, query_stride, area);
        const int64_t last_block = block_of(step_.positions[run.last - 1]);
        for (int64_t block = first_block(run.first); block <= last_block; ++block)
            add_block(job, block, [&](size_t row, int t, const float* sums, float largest, float sum) {
                merge(job.running + row * padded_size_, job.largest + row, job.totals + row, sums, largest, sum, block == first_block(t));
            });
        for (int row = 0; row < job.num_rows(); ++row) {
            const size_t token = run.first + row / job.heads, head = first_head + row % job.heads;
            finish(job.running + row * padded_size_, job.totals[row], out + token * out_stride + head * size_);
        }
    }

    // What the keys of one block add to these queries, for `merge_partials`.
    void attend_block(Run run, int kv_head, int first_head, int last_head, int64_t block, const float* queries, size_t query_stride,
                      const Partials& partials, float* area) const {
        const Job job = prepared(run, kv_head, first_head, last_head, queries, query_stride, area);
        add_block(job, block, [&](size_t row, int t, const float* sums, float largest, float sum) {
            float* to = partial(partials, t, first_head + static_cast<int>(row) % job.heads, block);
            memcpy(to, sums, sizeof(float) * padded_size_);
            to[padded_size_] = largest;
            to[padded_size_ + 1] = sum;
        });
    }

    // One head of token t from what `attend_block` gave for each block that it sees.
    void merge_partials(int t, int head, const Partials& partials, float* out, size_t out_stride, float* area) const {
        float largest, total;
        for (int64_t block = first_block(t); block <= block_of(step_.positions[t]); ++block) {
            const float* from = partial(partials, t, head, block);
            merge(area, &largest, &total, from, from[padded_size_], from[padded_size_ + 1], block == first_block(t));
        }
        finish(area, total, out + t * out_stride + static_cast<size_t>(head) * size_);
    }

    // The blocks of keys that token t sees: the first, and how many.
    int64_t first_block(int t) const { return block_of(first_key(t)); }
    int64_t num_key_blocks(int t) const { return block_of(step_.positions[t]) - first_block(t) + 1; }

   private:
    struct Job {
        Run run;
        int kv_head, heads;
        float *queries, *scores, *block_sums, *running, *largest, *totals;  // one row a token and head

        int num_rows() const { return (run.last - run.first) * heads; }
    };

    // The queries side by side, and where their numbers go, in a thread's area.
    Job prepared(Run run, int kv_head, int first_head, int last_head, const float* queries, size_t query_stride, float* area) const {
        Job job{run, kv_head, last_head - first_head, area, nullptr, nullptr, nullptr, nullptr, nullptr};
        const size_t rows = static_cast<size_t>(job.num_rows());
        job.scores = job.queries + rows * padded_size_;
        job.block_sums = job.scores + rows * kKeyBlock;
        job.running = job.block_sums + rows * padded_size_;
        job.largest = job.running + rows * padded_size_;
        job.totals = job.largest + rows;
        for (size_t row = 0; row < rows; ++row) {
            const size_t token = run.first + row / job.heads, head = first_head + row % job.heads;
            memcpy(job.queries + row * padded_size_, queries + token * query_stride + head * size_, sizeof(float) * size_);
        }
        return job;
    }

    float* partial(const Partials& partials, int t, int head, int64_t block) const {
        const size_t row = static_cast<size_t>(t) * model_.num_heads + head;
        return partials.numbers + (row * partials.blocks + static_cast<size_t>(block - first_block(t))) * partial_floats(model_);
    }

    void finish(const float* running, float total, float* out) const {
        const float inverse = 1.0f / total;
        for (int d = 0; d < size_; ++d) out[d] = running[d] * inverse;
    }

    static int64_t block_of(int64_t position) { return position / kKeyBlock; }

    size_t capacity() const { return static_cast<size_t>(model_.cache_capacity); }

    size_t head_of(int t, int kv_head) const { return static_cast<size_t>(step_.slots[t]) * model_.num_kv_heads + kv_head; }

    int64_t first_key(int t) const {
        const int64_t position = step_.positions[t];
        return layer_.window && position >= layer_.window ? position - layer_.window + 1 : 0;
    }

    // A row of a head into a cache, number d to place(d).
    template <typename Place>
    void put_numbers(void* cache, float* scales, int t, int kv_head, const float* x, Place place) const {
        if (model_.cache_kind == kFloat32) {
            for (int d = 0; d < size_; ++d) static_cast<float*>(cache)[place(d)] = x[d];
        } else if (model_.cache_kind == kFloat16) {
            uint16_t halves[kMaxHeadSize];
            to_halves(x, halves, size_);
            for (int d = 0; d < size_; ++d) static_cast<uint16_t*>(cache)[place(d)] = halves[d];
        } else {
            signed char codes[kMaxHeadSize];
            scales[head_of(t, kv_head) * capacity() + step_.positions[t]] = to_codes(x, codes, size_);
            for (int d = 0; d < size_; ++d) static_cast<signed char*>(cache)[place(d)] = codes[d];
        }
    }

    template <typename Take>
    void add_block(const Job& job, int64_t block, Take take) const {
        if (model_.cache_kind == kFloat32)
            add_keys<kFloat32>(job, block * kKeyBlock, take);
        else if (model_.cache_kind == kFloat16)
            add_keys<kFloat16>(job, block * kKeyBlock, take);
        else
            add_keys<kInt8>(job, block * kKeyBlock, take);
    }

    // The keys begin <= k < begin + 256, as far as the queries see them: take(row, token, sums of values, largest score, sum of
    // exponentials) for each row that sees any.
    template <int Type, typename Take>
    void add_keys(const Job& job, int64_t begin, Take take) const {
        const auto low = [&](int t) { return first_key(t) > begin ? first_key(t) : begin; };
        const auto high = [&](int t) { return step_.positions[t] + 1 < begin + kKeyBlock ? step_.positions[t] + 1 : begin + kKeyBlock; };
        Run run = job.run;  // those tokens that see any of these keys
        while (run.first < run.last && low(run.first) >= high(run.first)) ++run.first;
        while (run.first < run.last && low(run.last - 1) >= high(run.last - 1)) --run.last;
        if (run.first == run.last) return;
        const int64_t head = static_cast<int64_t>(head_of(run.first, job.kv_head));
        const size_t first_row = static_cast<size_t>(run.first - job.run.first) * job.heads;
        const int rows = (run.last - run.first) * job.heads;
        constexpr size_t kBytes = number_bytes(Type);
        float* scores = job.scores + first_row * kKeyBlock;

        const size_t key_block = static_cast<size_t>(size_) * kLanes * kBytes;
        const char* keys = static_cast<const char*>(layer_.keys) + (head * model_.cache_capacity + begin) * size_ * kBytes;
        product<Type>(Packed{keys, key_block, size_}, static_cast<int>((low(run.first) - begin) / kLanes),
                      num_blocks(static_cast<int>(high(run.last - 1) - begin)), job.queries + first_row * padded_size_, padded_size_, rows,
                      {scores, kKeyBlock, nullptr, kKeyBlock, false, 1.0f, false});

        float largest[kMaxTileRows], sums[kMaxTileRows];
        for (int r = 0; r < rows; ++r) {
            const int t = run.first + r / job.heads;
            const int64_t from = low(t);
            const int count = static_cast<int>(high(t) - from);
            float* row = scores + r * kKeyBlock + (from - begin);
            for (int i = 0; i < count; ++i) row[i] *= model_.attention_scale;
            if (Type == kInt8) multiply_by(row, layer_.key_scales + head * model_.cache_capacity + from, count);
            if (model_.attention_softcap > 0) soft_cap(row, count, model_.attention_softcap);
            sums[r] = exponentials(row, count, &largest[r]);
            if (Type == kInt8) multiply_by(row, layer_.value_scales + head * model_.cache_capacity + from, count);
        }

        float* block_sums = job.block_sums + first_row * padded_size_;
        memset(block_sums, 0, sizeof(float) * rows * padded_size_);
        const char* values = static_cast<const char*>(layer_.values) + (head * capacity() * padded_size_ + begin * kLanes) * kBytes;
        const auto add_values = [&](int64_t from, int64_t to, int first, int count) {  // of keys from <= k < to, for some rows
            if (from >= to) return;
            const Packed packed{values + (from - begin) * kLanes * kBytes, capacity() * kLanes * kBytes, static_cast<int>(to - from)};
            product<Type>(packed, 0, num_blocks(size_), scores + first * kKeyBlock + (from - begin), kKeyBlock, count,
                          {block_sums + first * padded_size_, padded_size_, nullptr, static_cast<int>(padded_size_), false, 1.0f, true});
        };
        // the keys that all tokens see go together; a key that only some see must not touch the rest, since 0 * NaN is NaN
        int64_t common = low(run.last - 1), end = high(run.first);
        if (common > end) common = end = high(run.last - 1);
        for (int t = run.first; t < run.last; ++t)
            add_values(low(t), common < high(t) ? common : high(t), (t - run.first) * job.heads, job.heads);
        add_values(common, end, 0, rows);
        for (int t = run.first; t < run.last; ++t)
            add_values(end > low(t) ? end : low(t), high(t), (t - run.first) * job.heads, job.heads);

        for (int r = 0; r < rows; ++r)
            take(first_row + r, run.first + r / job.heads, block_sums + r * padded_size_, largest[r], sums[r]);
    }

    void merge(float* running, float* running_largest, float* total, const float* block_sums, float largest, float sum, bool is_first) const {
        if (is_first) {
            memcpy(running, block_sums, sizeof(float) * padded_size_);
            *running_largest = largest;
            *total = sum;
            return;
        }
        const float most = largest > *running_largest ? largest : *running_largest;
        const float before = exp_of(*running_largest - most), now = exp_of(largest - most);
        for (size_t d = 0; d < padded_size_; ++d) running[d] = running[d] * before + block_sums[d] * now;
        *total = *total * before + sum * now;
        *running_largest = most;
    }

    static void multiply_by(float* x, const float* factors, int count) {
        for (int i = 0; i < count; ++i) x[i] *= factors[i];
    }

    const Model& model_;
    const Layer& layer_;
    const Step& step_;
    const int size_;
    const size_t padded_size_;
};

}  // namespace
}  // namespace llmctl
