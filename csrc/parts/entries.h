// The selected entries of many weights: cut into chunks for the threads, and walked through in blocks.
//
// Chunks are of equal size, so that a large tensor does not keep one thread busy while the others wait. A chunk is worked
// off in blocks: while one is computed, the cache lines of the next are on their way.
#pragma once

#include "parts/rows.h"

namespace {

constexpr int64_t CHUNK = 4096; // entries of one work item
constexpr int64_t BLOCK = 256;  // entries whose lines are in flight together

enum Intent : int { READ = 0, WRITE = 1 };

// In the second-level cache: it can wait for twice as many lines from memory as the first, which halves the time of a step.
template <Intent INTENT, class T> inline void ask_for(const T* p) { __builtin_prefetch(p, INTENT, 2); }

// Goes through CSR entries in order and knows the row it is in.
struct Walk {
    const fps::Entries* entries;
    int64_t entry, row;

    Walk(const fps::Entries& e, int64_t first) : entries(&e), entry(first) {
        int64_t lo = 0, hi = e.rows; // the last row that begins at or before `first`
        while (hi - lo > 1) {
            const int64_t middle = lo + (hi - lo) / 2;
            if (e.row_offsets[middle] <= first)
                lo = middle;
            else
                hi = middle;
        }
        row = lo;
    }

    // Calls `fn(i, row, column)` for the next n entries, i from 0 on.
    template <class Fn> void next(int64_t n, Fn fn) {
        for (int64_t i = 0; i < n;) {
            while (entry >= entries->row_offsets[row + 1]) ++row; // also steps over empty rows
            const int64_t stop = least(n, i + entries->row_offsets[row + 1] - entry);
            for (; i < stop; ++i, ++entry) fn(i, row, (int64_t)entries->columns[entry]);
        }
    }

    // Notes where in the weight the next n entries lie, and asks for their cache lines.
    template <Intent INTENT, class TW> void look_ahead(int64_t n, int64_t* places) {
        const TW* weight = (const TW*)entries->weight;
        next(n, [&](int64_t i, int64_t r, int64_t col) {
            places[i] = r * entries->row_stride + col * entries->col_stride;
            ask_for<INTENT>(weight + places[i]);
        });
    }
};

struct Chunk { // entries [begin, end) of one tensor
    int64_t tensor, begin, end;
};

// The chunks of n tensors, each a record with its `entries`.
struct Chunks {
    int64_t count;
    Scratch<Chunk> list;

    template <class Record> Chunks(const Record* records, int64_t n) : count(number_of(records, n)), list(count) {
        if (!list) return;
        Chunk* to = list.data;
        for (int64_t t = 0; t < n; ++t) {
            const int64_t nnz = records[t].entries.nnz;
            for (int64_t begin = 0; begin < nnz; begin += CHUNK) *to++ = {t, begin, least(begin + CHUNK, nnz)};
        }
    }

    template <class Record> static int64_t number_of(const Record* records, int64_t n) {
        int64_t chunks = 0;
        for (int64_t t = 0; t < n; ++t) chunks += ceil_div(records[t].entries.nnz, CHUNK);
        return chunks;
    }

    explicit operator bool() const { return (bool)list; }
    const Chunk& operator[](int64_t c) const { return list.data[c]; }
};

} // namespace
