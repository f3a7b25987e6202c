// Learns byte-pair merges from counted words. Knows symbols and counts; knows no text, no pre-tokenisation and no model.
//
// The order of the merges is that of the BpeTrainer of huggingface/tokenizers (src/models/bpe/trainer.rs): the most
// frequent pair first, of equals the one of the lowest ids; a pair enters the queue once, with the words that it was found
// in, and its count is brought up to date when it comes to the top. A merge whose token is there already reuses its id.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <new>
#include <queue>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using Pair = std::uint64_t;  // left id in the upper half: pairs compare as (left, right) do

Pair pair_of(std::uint32_t left, std::uint32_t right) { return static_cast<Pair>(left) << 32 | right; }

struct PairHash {
    std::size_t operator()(Pair pair) const {  // the finaliser of splitmix64
        pair = (pair ^ pair >> 30) * 0xBF58476D1CE4E5B9u;
        pair = (pair ^ pair >> 27) * 0x94D049BB133111EBu;
        return static_cast<std::size_t>(pair ^ pair >> 31);
    }
};

struct Candidate {
    std::int64_t count;
    Pair pair;
    std::vector<std::uint32_t> words;

    bool operator<(const Candidate& other) const { return count != other.count ? count < other.count : pair > other.pair; }
};

class Learner {
  public:
    Learner(std::uint32_t* symbols, const std::int64_t* offsets, const std::int64_t* counts, std::int64_t num_words)
        : symbols_(symbols), offsets_(offsets), counts_(counts), lengths_(num_words) {
        for (int symbol = 0; symbol < 256; ++symbol) add_token(std::string(1, static_cast<char>(symbol)));
        pair_counts_.reserve(1 << 18);
        std::vector<std::pair<Pair, std::uint32_t>> found;
        for (std::int64_t word = 0; word < num_words; ++word) {
            lengths_[word] = offsets[word + 1] - offsets[word];
            const std::uint32_t* part = symbols + offsets[word];
            for (std::int64_t i = 0; i + 1 < lengths_[word]; ++i) {
                const Pair pair = pair_of(part[i], part[i + 1]);
                pair_counts_[pair] += counts[word];
                found.emplace_back(pair, static_cast<std::uint32_t>(word));
            }
        }
        push(found);
    }

    std::int64_t run(std::uint32_t vocab_size, std::int64_t min_frequency, std::uint32_t* merges, std::int64_t max_merges,
                     const volatile std::int32_t* stop) {
        std::int64_t num_merges = 0;
        std::vector<std::pair<Pair, std::uint32_t>> found;
        while (tokens_.size() < vocab_size && num_merges < max_merges && !queue_.empty()) {
            if (*stop) return -2;
            Candidate top = std::move(const_cast<Candidate&>(queue_.top()));
            queue_.pop();
            const std::int64_t count = pair_counts_[top.pair];
            if (top.count != count) {
                top.count = count;
                queue_.push(std::move(top));
                continue;
            }
            if (count < 1 || count < min_frequency) break;
            const auto left = static_cast<std::uint32_t>(top.pair >> 32), right = static_cast<std::uint32_t>(top.pair);
            const std::uint32_t merged = add_token(tokens_[left] + tokens_[right]);
            merges[2 * num_merges] = left;
            merges[2 * num_merges + 1] = right;
            ++num_merges;
            found.clear();
            for (const std::uint32_t word : top.words) merge(word, left, right, merged, found);
            push(found);
        }
        return num_merges;
    }

  private:
    std::uint32_t add_token(const std::string& bytes) {
        const auto [place, is_new] = ids_.emplace(bytes, static_cast<std::uint32_t>(tokens_.size()));
        if (is_new) tokens_.push_back(bytes);
        return place->second;
    }

    // Every pair of `found` with its words into the queue, each word once.
    void push(std::vector<std::pair<Pair, std::uint32_t>>& found) {
        std::sort(found.begin(), found.end());
        found.erase(std::unique(found.begin(), found.end()), found.end());
        for (std::size_t start = 0, end = 0; start < found.size(); start = end) {
            const Pair pair = found[start].first;
            while (end < found.size() && found[end].first == pair) ++end;
            const std::int64_t count = pair_counts_[pair];
            if (count <= 0) continue;
            Candidate candidate{count, pair, {}};
            candidate.words.reserve(end - start);
            for (std::size_t i = start; i < end; ++i) candidate.words.push_back(found[i].second);
            queue_.push(std::move(candidate));
        }
    }

    void merge(std::uint32_t word, std::uint32_t left, std::uint32_t right, std::uint32_t merged,
               std::vector<std::pair<Pair, std::uint32_t>>& found) {
        std::uint32_t* part = symbols_ + offsets_[word];
        const std::int64_t length = lengths_[word], count = counts_[word];
        std::int64_t written = 0, read = 0;
        while (read < length) {
            if (read + 1 == length || part[read] != left || part[read + 1] != right) {
                part[written++] = part[read++];
                continue;
            }
            if (written > 0) {
                pair_counts_[pair_of(part[written - 1], left)] -= count;
                change(pair_of(part[written - 1], merged), count, word, found);
            }
            read += 2;
            if (read < length) {
                pair_counts_[pair_of(right, part[read])] -= count;
                change(pair_of(merged, part[read]), count, word, found);
            }
            part[written++] = merged;
        }
        lengths_[word] = written;
    }

    void change(Pair pair, std::int64_t count, std::uint32_t word, std::vector<std::pair<Pair, std::uint32_t>>& found) {
        pair_counts_[pair] += count;
        found.emplace_back(pair, word);
    }

    std::uint32_t* symbols_;
    const std::int64_t* offsets_;
    const std::int64_t* counts_;
    std::vector<std::int64_t> lengths_;
    std::vector<std::string> tokens_;
    std::unordered_map<std::string, std::uint32_t> ids_;
    std::unordered_map<Pair, std::int64_t, PairHash> pair_counts_;
    std::priority_queue<Candidate> queue_;
};

}  // namespace

// symbols: ids 0 to 255, the words one after another (overwritten); offsets (num_words + 1); counts (num_words). Writes
// pairs of ids to merges (max_merges, 2), and gives how many; -1 without memory, -2 when *stop became other than 0.
extern "C" __attribute__((visibility("default"))) std::int64_t llmctl_bpe_learn(
    std::uint32_t* symbols, const std::int64_t* offsets, const std::int64_t* counts, std::int64_t num_words, std::uint32_t vocab_size,
    std::int64_t min_frequency, std::uint32_t* merges, std::int64_t max_merges, const volatile std::int32_t* stop) {
    try {
        return Learner(symbols, offsets, counts, num_words).run(vocab_size, min_frequency, merges, max_merges, stop);
    } catch (const std::bad_alloc&) {
        return -1;
    }
}
