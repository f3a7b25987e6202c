// Counts the words of a text as a pre-tokeniser cuts it. Knows UTF-8, two patterns and a bound on memory; knows no merges.
//
// The patterns are written out by hand, since a regular expression with classes of Unicode does some 5 MB/s:
//   0: Llama 3 (meta-llama/Meta-Llama-3-8B, tokenizer.json)
//      (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
//   1: GPT-2 (openai/gpt-2, src/encoder.py)
//      's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
// tests/core/native/test_words.py holds them against those expressions.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "unicode_classes.h"

namespace {

enum Class : std::uint8_t { other, letter, number, space };

class Classes {
  public:
    Classes() : table_(0x110000, other) {
        for (const auto& range : letters) fill(range, letter);
        for (const auto& range : numbers) fill(range, number);
        for (const auto& range : spaces) fill(range, space);
    }
    std::uint8_t operator[](std::uint32_t code) const { return table_[code]; }

  private:
    void fill(const std::uint32_t (&range)[2], Class value) {
        std::fill(table_.begin() + range[0], table_.begin() + range[1] + 1, static_cast<std::uint8_t>(value));
    }
    std::vector<std::uint8_t> table_;
};

const Classes& classes() {
    static const Classes table;
    return table;
}

struct AsciiClasses {
    std::uint8_t of[128] = {};
    constexpr AsciiClasses() {
        for (const auto& range : letters) fill(range, letter);
        for (const auto& range : numbers) fill(range, number);
        for (const auto& range : spaces) fill(range, space);
    }
    constexpr void fill(const std::uint32_t (&range)[2], Class value) {
        for (std::uint32_t code = range[0]; code <= range[1] && code < 128; ++code) of[code] = value;
    }
};
constexpr AsciiClasses ascii;

using Byte = std::uint8_t;

// One character: its class and its bytes. At the end of the text its bytes are 0.
struct Char {
    std::uint32_t code;
    std::uint8_t kind, num_bytes;

    bool is_break() const { return code == '\n' || code == '\r'; }
};

Char wide_char_at(const Byte* place, const Byte* end) {
    std::uint32_t code = *place;
    const std::uint8_t length = code < 0xE0 ? 2 : code < 0xF0 ? 3 : 4;
    if (place + length > end) return {0xFFFD, other, static_cast<std::uint8_t>(end - place)};
    code &= 0xFFu >> (length + 1);
    for (int i = 1; i < length; ++i) code = code << 6 | (place[i] & 0x3F);
    if (code >= 0x110000) return {0xFFFD, other, length};
    return {code, classes()[code], length};
}

inline Char char_at(const Byte* place, const Byte* end) {
    if (place >= end) return {0, other, 0};
    if (*place < 0x80) return {*place, ascii.of[*place], 1};
    return wide_char_at(place, end);
}

const Byte* run_of(const Byte* place, const Byte* end, Class kind) {
    while (place < end && *place < 0x80 && ascii.of[*place] == kind) ++place;
    for (Char next; (next = char_at(place, end)).num_bytes && next.kind == kind;) place += next.num_bytes;
    return place;
}

// The end of 's, 't, 're, 've, 'm, 'll or 'd at `place`, or nullptr.
const Byte* contraction(const Byte* place, const Byte* end, bool folds_case) {
    if (*place != '\'' || place + 1 >= end) return nullptr;
    const auto letter_at = [&](int i) -> int {
        if (place + i >= end) return 0;
        const Byte byte = place[i];
        return folds_case && byte >= 'A' && byte <= 'Z' ? byte + 32 : byte;
    };
    const int first = letter_at(1), second = letter_at(2);
    if (first == 's' || first == 't' || first == 'm' || first == 'd') return place + 2;
    if (folds_case && first == 0xC5 && second == 0xBF) return place + 3;  // the long s
    if (((first == 'r' || first == 'v') && second == 'e') || (first == 'l' && second == 'l')) return place + 3;
    return nullptr;
}

// White space from `place` on: \s+(?!\S)|\s+, and before that with `takes_breaks` \s*[\r\n]+.
const Byte* blanks(const Byte* place, const Byte* end, bool takes_breaks) {
    const Byte *last = place, *after_break = nullptr, *here = place;
    for (Char next; (next = char_at(here, end)).num_bytes && next.kind == space;) {
        last = here;
        here += next.num_bytes;
        if (next.is_break()) after_break = here;
    }
    if (takes_breaks && after_break) return after_break;
    return here == end || last == place ? here : last;
}

// The end of the word that begins at `place`, which is before `end`.
const Byte* llama3_word(const Byte* place, const Byte* end) {
    if (const Byte* found = contraction(place, end, true)) return found;
    const Char first = char_at(place, end);
    if (first.kind == letter) return run_of(place + first.num_bytes, end, letter);
    if (first.kind == number) {
        const Byte* here = place;
        Char next = first;
        for (int i = 0; i < 3 && next.num_bytes && next.kind == number; ++i) next = char_at(here += next.num_bytes, end);
        return here;
    }
    const Byte* after = place + first.num_bytes;
    const Char second = char_at(after, end);
    if (!first.is_break() && second.num_bytes && second.kind == letter) return run_of(after, end, letter);
    const bool has_second = second.num_bytes && second.kind == other;
    if (first.kind == space && !(first.code == ' ' && has_second)) return blanks(place, end, true);
    const Byte* here = run_of(after, end, other);
    while (here < end && (*here == '\r' || *here == '\n')) ++here;
    return here;
}

const Byte* gpt2_word(const Byte* place, const Byte* end) {
    if (const Byte* found = contraction(place, end, false)) return found;
    const Char first = char_at(place, end);
    if (first.kind != space) return run_of(place + first.num_bytes, end, static_cast<Class>(first.kind));
    const Char second = char_at(place + 1, end);
    if (first.code == ' ' && second.num_bytes && second.kind != space) return run_of(place + 1, end, static_cast<Class>(second.kind));
    return blanks(place, end, false);
}

using Pattern = const Byte* (*)(const Byte*, const Byte*);
constexpr Pattern patterns[] = {llama3_word, gpt2_word};

// Words and how often they came, in a table that holds at most `max_bytes`: see `make_room`.
class Words {
  public:
    Words(Pattern pattern, std::int64_t longest_run, std::int64_t max_bytes)
        : pattern_(pattern), longest_run_(longest_run), max_bytes_(max_bytes), slots_(1 << 12) {}

    // A text, cut before each `longest_run` characters without white space.
    void add(const Byte* text, const Byte* end) {
        const Byte* start = text;
        std::int64_t run = 0;
        for (const Byte* here = text; here < end;) {
            const Char next = char_at(here, end);
            if (next.kind == space || (next.code >= 0x1C && next.code <= 0x1F)) {
                run = 0;
            } else if (++run > longest_run_) {
                add_part(start, here);
                start = here;
                run = 1;
            }
            here += next.num_bytes;
        }
        add_part(start, end);
    }

    void facts(std::int64_t* out) const {
        out[0] = static_cast<std::int64_t>(entries_.size());
        out[1] = static_cast<std::int64_t>(bytes_.size());
        out[2] = num_found_;
        out[3] = num_dropped_;
        out[4] = most_missed_;
    }

    // In the order of their bytes.
    void take(Byte* text, std::int64_t* offsets, std::int64_t* counts) const {
        std::vector<std::uint32_t> order(entries_.size());
        std::iota(order.begin(), order.end(), 0u);
        std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) { return is_before(entries_[a], entries_[b]); });
        std::int64_t written = 0;
        for (std::size_t i = 0; i < order.size(); ++i) {
            const Entry& entry = entries_[order[i]];
            std::memcpy(text + written, bytes_.data() + entry.start, entry.length);
            offsets[i] = written;
            counts[i] = entry.count;
            written += entry.length;
        }
        offsets[order.size()] = written;
    }

  private:
    struct Entry {
        std::int64_t count;
        std::uint64_t start, head;  // head: the first bytes, so that a short word is compared without a look at bytes_
        std::uint32_t length, hash;
    };

    // The first bytes of a word, eight at most.
    static std::uint64_t head_of(const Byte* word, std::size_t length, const Byte* end) {
        std::uint64_t block = 0;
        if (length >= 8 || end - word < 8) {
            std::memcpy(&block, word, std::min<std::size_t>(length, 8));
            return block;
        }
        std::memcpy(&block, word, 8);  // beyond the word, for a load is quicker than a copy of unknown length
        return low_bytes(block, length);
    }

    static std::uint64_t low_bytes(std::uint64_t block, std::size_t length) {
        const std::uint16_t one = 1;
        Byte first;
        std::memcpy(&first, &one, 1);
        return first ? block & ((std::uint64_t{1} << 8 * length) - 1) : block >> (64 - 8 * length) << (64 - 8 * length);
    }

    static std::uint32_t hash_of(const Byte* word, std::size_t length, std::uint64_t head) {
        std::uint64_t hash = mixed(length * 0x9E3779B97F4A7C15u, head);
        for (std::size_t done = 8; done < length; done += 8) {
            std::uint64_t block = 0;
            std::memcpy(&block, word + done, std::min<std::size_t>(length - done, 8));
            hash = mixed(hash, block);
        }
        return static_cast<std::uint32_t>(hash >> 32);
    }

    static std::uint64_t mixed(std::uint64_t hash, std::uint64_t block) {
        hash = (hash ^ block) * 0xBF58476D1CE4E5B9u;
        return hash ^ hash >> 29;
    }

    bool is_before(const Entry& a, const Entry& b) const {
        const int order = std::memcmp(bytes_.data() + a.start, bytes_.data() + b.start, std::min(a.length, b.length));
        return order != 0 ? order < 0 : a.length < b.length;
    }

    void add_part(const Byte* here, const Byte* end) {
        while (here < end) {
            const Byte* next = pattern_(here, end);
            count(here, static_cast<std::size_t>(next - here), end);
            here = next;
        }
    }

    void count(const Byte* word, std::size_t length, const Byte* end) {
        ++num_found_;
        const std::uint64_t head = head_of(word, length, end);
        const std::uint32_t hash = hash_of(word, length, head);
        std::size_t slot = hash & (slots_.size() - 1);
        for (; slots_[slot]; slot = (slot + 1) & (slots_.size() - 1)) {
            Entry& entry = entries_[slots_[slot] - 1];
            if (entry.head == head && entry.length == length && entry.hash == hash &&
                (length <= 8 || !std::memcmp(bytes_.data() + entry.start, word, length))) {
                ++entry.count;
                return;
            }
        }
        entries_.push_back({1, bytes_.size(), head, static_cast<std::uint32_t>(length), hash});
        bytes_.insert(bytes_.end(), word, word + length);
        slots_[slot] = static_cast<std::uint32_t>(entries_.size());
        if (held_bytes() > max_bytes_) make_room();
        if (2 * entries_.size() > slots_.size()) place_all(2 * slots_.size());
    }

    std::int64_t held_bytes() const {
        return static_cast<std::int64_t>(bytes_.size() + entries_.size() * (sizeof(Entry) + 2 * sizeof(std::uint32_t)));
    }

    // Drops the rarest words: all that came at most t times, for the lowest t that leaves the table half empty. As in lossy
    // counting (Manku and Motwani, 2002), a count is too low by at most the sum of the t.
    void make_room() {
        std::vector<std::int64_t> counts;
        for (const Entry& entry : entries_) counts.push_back(entry.count);
        const auto middle = counts.begin() + static_cast<std::ptrdiff_t>(counts.size() / 2);
        std::nth_element(counts.begin(), middle, counts.end());
        const std::int64_t most = *middle;
        std::vector<Entry> kept;
        std::vector<Byte> bytes;
        for (Entry entry : entries_) {
            if (entry.count <= most) {
                num_dropped_ += entry.count;
                continue;
            }
            const Byte* word = bytes_.data() + entry.start;
            entry.start = bytes.size();
            bytes.insert(bytes.end(), word, word + entry.length);
            kept.push_back(entry);
        }
        entries_ = std::move(kept);
        bytes_ = std::move(bytes);
        most_missed_ += most;
        place_all(slots_.size());
    }

    void place_all(std::size_t num_slots) {
        slots_.assign(num_slots, 0);
        for (std::size_t i = 0; i < entries_.size(); ++i) {
            std::size_t slot = entries_[i].hash & (num_slots - 1);
            while (slots_[slot]) slot = (slot + 1) & (num_slots - 1);
            slots_[slot] = static_cast<std::uint32_t>(i + 1);
        }
    }

    Pattern pattern_;
    std::int64_t longest_run_, max_bytes_;
    std::int64_t num_found_ = 0, num_dropped_ = 0, most_missed_ = 0;
    std::vector<std::uint32_t> slots_;  // index of an entry + 1
    std::vector<Entry> entries_;
    std::vector<Byte> bytes_;
};

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// A counter that holds about max_bytes; nullptr without memory. Free it with llmctl_words_close.
EXPORT void* llmctl_words_open(std::int32_t pattern, std::int64_t longest_run, std::int64_t max_bytes) {
    try {
        return new Words(patterns[pattern], longest_run, max_bytes);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

// Texts (UTF-8) one after another; ends (num_texts). -1 without memory.
EXPORT std::int32_t llmctl_words_add(void* words, const std::uint8_t* text, const std::int64_t* ends, std::int64_t num_texts) {
    try {
        for (std::int64_t i = 0, start = 0; i < num_texts; start = ends[i++]) static_cast<Words*>(words)->add(text + start, text + ends[i]);
        return 0;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

// out (5): different words, their bytes, words counted, of them dropped with what they had been counted for, and by how much
// a count may be too low.
EXPORT void llmctl_words_facts(const void* words, std::int64_t* out) { static_cast<const Words*>(words)->facts(out); }

// text (bytes), offsets (words + 1), counts (words), in the order of the words' bytes. -1 without memory.
EXPORT std::int32_t llmctl_words_take(const void* words, std::uint8_t* text, std::int64_t* offsets, std::int64_t* counts) {
    try {
        static_cast<const Words*>(words)->take(text, offsets, counts);
        return 0;
    } catch (const std::bad_alloc&) {
        return -1;
    }
}

EXPORT void llmctl_words_close(void* words) { delete static_cast<Words*>(words); }

// The ends of the words of a text, ends (at least num_bytes); gives how many.
EXPORT std::int64_t llmctl_words_cut(std::int32_t pattern, const std::uint8_t* text, std::int64_t num_bytes, std::int64_t* ends) {
    std::int64_t number = 0;
    for (const Byte *here = text, *end = text + num_bytes; here < end; ++number) {
        here = patterns[pattern](here, end);
        ends[number] = here - text;
    }
    return number;
}
