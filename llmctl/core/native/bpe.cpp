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

// How often each pair occurs: open addressing, since the nodes of std::unordered_map took most of the time.
class PairCounts {
  public:
    PairCounts() : slots_(1 << 16, Slot{empty_, 0}) {}

    std::int64_t& operator[](Pair pair) {
        if (2 * num_pairs_ >= slots_.size()) grow();
        Slot& slot = slots_[place_of(pair)];
        if (slot.pair == empty_) {
            slot.pair = pair;
            ++num_pairs_;
        }
        return slot.count;
    }

  private:
    struct Slot {
        Pair pair;
        std::int64_t count;
    };
    static constexpr Pair empty_ = ~Pair{0};

    std::size_t place_of(Pair pair) const {
        Pair hash = (pair ^ pair >> 30) * 0xBF58476D1CE4E5B9u;  // the finaliser of splitmix64
        hash = (hash ^ hash >> 27) * 0x94D049BB133111EBu;
        std::size_t place = static_cast<std::size_t>(hash ^ hash >> 31) & (slots_.size() - 1);
        while (slots_[place].pair != pair && slots_[place].pair != empty_) place = (place + 1) & (slots_.size() - 1);
        return place;
    }

    void grow() {
        std::vector<Slot> old(2 * slots_.size(), Slot{empty_, 0});
        old.swap(slots_);
        for (const Slot& slot : old) {
            if (slot.pair != empty_) slots_[place_of(slot.pair)] = slot;
        }
    }

    std::vector<Slot> slots_;
    std::size_t num_pairs_ = 0;
};

struct Candidate {
    std::int64_t count;
    Pair pair;
    std::vector<std::uint32_t> words;

    bool operator<(const Candidate& other) const { return count != other.count ? count < other.count : pair > other.pair; }
};

// Words as symbols, and tokens as bytes. What `num_tokens` tokens the caller names are there from the beginning: a merge into
// one of the first `num_closed` of them is left out.
class Learner {
  public:
    Learner(std::uint32_t* symbols, const std::int64_t* offsets, const std::int64_t* counts, std::int64_t num_words,
            const std::uint8_t* tokens, const std::int64_t* token_ends, std::int64_t num_tokens, std::int64_t num_closed)
        : symbols_(symbols), offsets_(offsets), counts_(counts), lengths_(num_words), num_closed_(static_cast<std::uint32_t>(num_closed)) {
        for (std::int64_t i = 0, start = 0; i < num_tokens; start = token_ends[i++]) {
            tokens_.emplace_back(reinterpret_cast<const char*>(tokens) + start, token_ends[i] - start);
            ids_.emplace(tokens_.back(), static_cast<std::uint32_t>(i));  // of two that are equal, the first
        }
        for (std::int64_t word = 0; word < num_words; ++word) lengths_[word] = offsets[word + 1] - offsets[word];
        find_pairs();
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
            if (merged < num_closed_) continue;
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
    // All pairs with the words that they stand in, each word once: counted first, so that no list grows.
    void find_pairs() {
        struct Found {
            Pair pair;
            std::uint32_t num_words = 0, last_word = 0xFFFFFFFFu;
        };
        std::vector<Found> found;
        PairCounts places;  // of each pair in `found`, from 1
        const auto each = [&](auto&& visit) {
            for (std::size_t word = 0; word < lengths_.size(); ++word) {
                const std::uint32_t* part = symbols_ + offsets_[word];
                for (std::int64_t i = 0; i + 1 < lengths_[word]; ++i) {
                    visit(pair_of(part[i], part[i + 1]), static_cast<std::uint32_t>(word));
                }
            }
        };
        each([&](Pair pair, std::uint32_t word) {
            std::int64_t& place = places[pair];
            if (!place) {
                found.push_back({pair});
                place = static_cast<std::int64_t>(found.size());
            }
            Found& entry = found[place - 1];
            pair_counts_[pair] += counts_[word];
            if (entry.last_word != word) entry.last_word = word, ++entry.num_words;
        });
        std::vector<std::vector<std::uint32_t>> lists(found.size());
        for (std::size_t i = 0; i < found.size(); ++i) lists[i].reserve(found[i].num_words);
        each([&](Pair pair, std::uint32_t word) {
            auto& words = lists[places[pair] - 1];
            if (words.empty() || words.back() != word) words.push_back(word);
        });
        for (std::size_t i = 0; i < found.size(); ++i) {
            queue_.push(Candidate{pair_counts_[found[i].pair], found[i].pair, std::move(lists[i])});
        }
    }

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
    std::uint32_t num_closed_;
    std::vector<std::string> tokens_;
    std::unordered_map<std::string, std::uint32_t> ids_;
    PairCounts pair_counts_;
    std::priority_queue<Candidate> queue_;
};

}  // namespace

// symbols: ids of tokens, the words one after another (overwritten); offsets (num_words + 1); counts (num_words); the bytes of
// the tokens and where each ends (num_tokens), of which none of the first num_closed is made again. Writes pairs of ids to
// merges (max_merges, 2), and gives how many; -1 without memory, -2 when *stop became other than 0.
extern "C" __attribute__((visibility("default"))) std::int64_t llmctl_bpe_learn(
    std::uint32_t* symbols, const std::int64_t* offsets, const std::int64_t* counts, std::int64_t num_words, const std::uint8_t* tokens,
    const std::int64_t* token_ends, std::int64_t num_tokens, std::int64_t num_closed, std::uint32_t vocab_size,
    std::int64_t min_frequency, std::uint32_t* merges, std::int64_t max_merges, const volatile std::int32_t* stop) {
    try {
        return Learner(symbols, offsets, counts, num_words, tokens, token_ends, num_tokens, num_closed)
            .run(vocab_size, min_frequency, merges, max_merges, stop);
    } catch (const std::bad_alloc&) {
        return -1;
    }
}
