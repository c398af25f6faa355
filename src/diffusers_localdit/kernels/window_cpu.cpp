// Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
//
// Window attention of LocalDiT and the convolutions and excitation of its global context on a CPU, in float32 and
// bfloat16, which is computed in float32 and rounded once. cpu.py compiles and calls it.
//
// Shape legend: B batch, l tokens, n windows, m = w * w members of a window, d channels of a head, C = heads * d.
//
// Tokens are read and written where they lie in the picture, or in a part of it that holds some whole rows of windows.
// A thread takes a window, and its heads one after the other, each of which fits into the nearest caches. There a query
// has a lane: tokens lie as (d, m), so that norms, rotary embedding and softmax go down columns and no sum goes across
// lanes. The memory that the next head needs is asked for meanwhile: its m pieces are too many streams for a processor
// to foresee.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif
constexpr int TILE = 8;  // sums at a time, as many as hide how long one takes; LANES is a multiple

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));

struct bfloat16 { uint16_t bits; };

static int padded(int length) { return (length + LANES - 1) / LANES * LANES; }

// Numbers in memory

static inline Vec widened(Halves bits) {
#ifdef __AVX512F__
    return (Vec)((Words)_mm512_cvtepu16_epi32((__m256i)bits) << 16);  // GCC makes two halves of what is below
#else
    return (Vec)(__builtin_convertvector(bits, Words) << 16);
#endif
}

static inline Halves rounded(Vec x) {
    Words bits = (Words)x, nearest = bits + 0x7fff + (bits >> 16 & 1);  // ties to even
    Words nan = (Words)(x != x);
    return __builtin_convertvector(((nan & 0x7fc00000) | (~nan & nearest)) >> 16, Halves);
}

static inline Vec load(const float* from) {
    Vec x;
    memcpy(&x, from, sizeof x);
    return x;
}

static inline Vec load(const bfloat16* from) {
    Halves bits;
    memcpy(&bits, from, sizeof bits);
    return widened(bits);
}

static inline void store(float* to, Vec x) { memcpy(to, &x, sizeof x); }

static inline void store(bfloat16* to, Vec x) {
    Halves bits = rounded(x);
    memcpy(to, &bits, sizeof bits);
}

// The first `count` lanes; others are read as zeros and not written.
#ifdef __AVX512F__
static inline __mmask16 lanes_before(int count) { return count >= LANES ? 0xffff : (1 << count) - 1; }

static inline Vec load(const float* from, int count) { return (Vec)_mm512_maskz_loadu_ps(lanes_before(count), from); }

static inline Vec load(const bfloat16* from, int count) {
    return widened((Halves)_mm256_maskz_loadu_epi16(lanes_before(count), from));
}

static inline void store(float* to, Vec x, int count) { _mm512_mask_storeu_ps(to, lanes_before(count), (__m512)x); }

static inline void store(bfloat16* to, Vec x, int count) {
    _mm256_mask_storeu_epi16(to, lanes_before(count), (__m256i)rounded(x));
}
#else
template <class T> static inline Vec load(const T* from, int count) {
    if (count >= LANES) return load(from);
    T numbers[LANES] = {};
    memcpy(numbers, from, count * sizeof(T));
    return load(numbers);
}

template <class T> static inline void store(T* to, Vec x, int count) {
    if (count >= LANES) return store(to, x);
    T numbers[LANES];
    store(numbers, x);
    memcpy(to, numbers, count * sizeof(T));
}
#endif

template <class T> static inline void fetch(const T* from, int count) {
    for (int i = 0; i < count; i += 64 / sizeof(T)) __builtin_prefetch(from + i, 0, 2);
    __builtin_prefetch(from + count - 1, 0, 2);
}

// Functions

static inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }

static inline Vec square_root(Vec x) {
    for (int lane = 0; lane < LANES; lane++) x[lane] = std::sqrt(x[lane]);  // compiled to one instruction
    return x;
}

// e^x for x <= 0, as 2^k e^r with |r| <= ln(2) / 2 and the Taylor series of e^r, whose rest is 5e-9. Zero where it would
// be less than the smallest normal number: from such numbers processors compute many times as slowly.
static inline Vec exponential(Vec x) {
    constexpr float ROUNDS = 3 << 22;  // of a sum with it only the integer part stays
    Vec k = (larger(x, Vec{} - 87) * 1.44269504f + ROUNDS) - ROUNDS;
    Vec r = (x - k * 0.693145752f) - k * 1.42860677e-6f;  // ln(2), in two parts
    Vec sum = Vec{} + 1.f / 5040;
    for (float coefficient : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f}) sum = sum * r + coefficient;
    Vec power = (Vec)((__builtin_convertvector(k, Ints) + 127) << 23);
    return x < -87 ? Vec{} : sum * power;
}

// x Phi(x), the exact GELU, with (Phi(x) - 1/2) / x a polynomial of 2 (x / 5.2)^2 - 1, fitted by least squares at 2000
// Chebyshev nodes. Beyond 5.2 Phi is 0 or 1 to 1e-7.
static inline Vec gelu(Vec x) {
    constexpr float END = 5.2f;
    static const float COEFFICIENTS[] = {
        2.426031313e-04f, -5.824338350e-04f, 4.700877102e-04f, -9.180869670e-04f, 2.828264198e-03f,
        -5.136607013e-03f, 7.906474066e-03f, -1.231559413e-02f, 1.816688255e-02f, -2.477336263e-02f,
        3.195738074e-02f, -3.992429612e-02f, 5.002638438e-02f, -6.774383999e-02f, 1.359499758e-01f,
    };
    Vec s = x * x * (2 / END / END) - 1;
    Vec slope = Vec{} + COEFFICIENTS[0];
    for (int i = 1; i < 15; i++) slope = slope * s + COEFFICIENTS[i];
    Vec phi = x * slope + 0.5f;
    return x > END ? x : x < -END ? x * 0 : x * phi;
}

static inline void interleave(Vec a, Vec b, Vec& first, Vec& second) {
#ifdef __AVX512F__
    first = __builtin_shuffle(a, b, Ints{0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23});
    second = __builtin_shuffle(a, b, Ints{8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31});
#else
    first = __builtin_shuffle(a, b, Ints{0, 8, 1, 9, 2, 10, 3, 11});
    second = __builtin_shuffle(a, b, Ints{4, 12, 5, 13, 6, 14, 7, 15});
#endif
}

// A square of LANES x LANES numbers: interleaving its halves turns the address (row, column) by one bit.
static inline void transpose(Vec* rows) {
    for (int turned = 1; turned < LANES; turned *= 2) {
        Vec next[LANES];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / 2; i++) interleave(rows[i], rows[i + LANES / 2], next[2 * i], next[2 * i + 1]);
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++) rows[i] = next[i];
    }
}

// Attention

// As cpu.py fills it in. T is the dtype. Tensors are contiguous, but tokens may lie further apart than C numbers.
struct Attention {
    void *query;      // (B, l, C), or on the rolled map: (B, n / across * w, across * w, C)
    void *key;        // (B, l, C)
    void *value;      // (B, l, C)
    void *output;     // (B, l, C), contiguous; may be `value`
    void *query_map;  // prepared queries on the rolled map, unless null; `key` is overwritten by prepared keys then
    const void *key_of_padding, *value_of_padding;  // (C,), for the context branch, if there is padding
    const float *norm_q, *norm_k;   // (d,)
    const float *bias;              // (heads, m, padded(m)): of each key to all queries
    const float *mask;              // (n, m, m), symmetric
    const float *cos, *sin;         // (tokens, d / 2), or null
    const int64_t *window_to_token; // (n, m): row of cos and sin
    const int64_t *places;          // (n, m): among the l tokens, or -1 for padding
    int64_t query_stride, key_stride, value_stride;  // from token to token
    int64_t batch, tokens, windows, across, w, heads, d, threads;
    float eps, share;               // factor of the output
};

// What a thread keeps of one window and head.
struct Head {
    std::vector<float> memory;
    float *query, *key;  // (d, padded(m))
    float *value;        // (m, padded(d))
    float *cos, *sin;    // (d / 2, padded(m)), of all heads
    float *weights;      // (padded(m), LANES): of all keys for the queries at hand

    Head(int m, int d) : memory(3 * d * padded(m) + m * padded(d) + padded(m) * LANES + 16) {
        float* at = (float*)(((uintptr_t)memory.data() + 63) & ~(uintptr_t)63);
        query = at, at += d * padded(m);
        key = at, at += d * padded(m);
        cos = at, at += d / 2 * padded(m);
        sin = at, at += d / 2 * padded(m);
        weights = at, at += padded(m) * LANES;
        value = at;
    }
};

// (m, d) to (d, padded(m)); rows that are null are zeros.
template <class T> static void gather(const T* const* rows, int m, int d, float* columns) {
    for (int i = 0; i < m; i += LANES)
        for (int c = 0; c < d; c += LANES) {
            Vec square[LANES];
            for (int r = 0; r < LANES; r++) square[r] = i + r < m && rows[i + r] ? load(rows[i + r] + c, d - c) : Vec{};
            transpose(square);
            for (int r = 0; r < LANES && c + r < d; r++) store(columns + (c + r) * padded(m) + i, square[r]);
        }
}

template <class T> static void scatter(const float* columns, int m, int d, T* const* rows) {
    for (int i = 0; i < m; i += LANES)
        for (int c = 0; c < d; c += LANES) {
            Vec square[LANES];
            for (int r = 0; r < LANES; r++) square[r] = c + r < d ? load(columns + (c + r) * padded(m) + i) : Vec{};
            transpose(square);
            for (int r = 0; r < LANES && i + r < m; r++) store(rows[i + r] + c, square[r], d - c);
        }
}

// RMS norm and rotary embedding, in place.
static void prepare(float* columns, int m, int d, const float* weight, float eps, const float* cos, const float* sin) {
    int length = padded(m);
    for (int i = 0; i < length; i += LANES) {
        Vec squares = {};
        for (int c = 0; c < d; c++) {
            Vec x = load(columns + c * length + i);
            squares += x * x;
        }
        Vec scale = 1 / square_root(squares / (float)d + eps);
        for (int c = 0; c < d; c += 2) {
            float *first = columns + c * length + i, *second = first + length;
            Vec a = load(first) * scale * weight[c], b = load(second) * scale * weight[c + 1];
            Vec cosine = Vec{} + 1, sine = {};
            if (cos) cosine = load(cos + c / 2 * length + i), sine = load(sin + c / 2 * length + i);
            store(first, a * cosine - b * sine);
            store(second, a * sine + b * cosine);
        }
    }
}

// softmax(K Q / sqrt(d) + bias + mask), down the columns, times V: added to the rows of the output or put there.
template <class T, bool ADD>
static void attend(const Head& head, int m, int d, const float* bias, const float* mask, float share, T* const* rows) {
    int length = padded(m);
    float scale = 1 / std::sqrt((float)d);
    for (int i = 0; i < m; i += LANES) {
        Vec largest = Vec{} - INFINITY;
        for (int j = 0; j < m; j += TILE) {
            Vec sums[TILE] = {};
            for (int c = 0; c < d; c++) {
                Vec query = load(head.query + c * length + i);
                const float* key = head.key + c * length + j;
#pragma GCC unroll 8
                for (int r = 0; r < TILE; r++) sums[r] += query * key[r];
            }
            for (int r = 0; r < TILE && j + r < m; r++) {
                Vec score = sums[r] * scale + load(bias + (j + r) * length + i) + load(mask + (j + r) * m + i, m - i);
                largest = larger(largest, score);
                store(head.weights + (j + r) * LANES, score);
            }
        }
        Vec total = {};
        for (int j = 0; j < m; j++) {
            Vec weight = exponential(load(head.weights + j * LANES) - largest);
            total += weight;
            store(head.weights + j * LANES, weight);
        }
        float factor[LANES];
        store(factor, share / total);
        for (int c = 0; c < d; c += LANES)
            for (int l = 0; l < LANES && i + l < m; l += TILE) {
                Vec sums[TILE] = {};
                for (int j = 0; j < m; j++) {
                    Vec value = load(head.value + j * padded(d) + c);
                    const float* weight = head.weights + j * LANES + l;
#pragma GCC unroll 8
                    for (int r = 0; r < TILE; r++) sums[r] += value * weight[r];
                }
                for (int r = 0; r < TILE && i + l + r < m; r++) {
                    T* output = rows[i + l + r] + c;
                    Vec x = sums[r] * factor[l + r];
                    store(output, ADD ? load(output, d - c) + x : x, d - c);
                }
            }
    }
}

// The local branch, or with ADD the context branch, whose queries come from the map and are prepared already.
template <class T, bool ADD> static void window_attention(const Attention& a) {
    int m = a.w * a.w, d = a.d;
    int64_t channels = a.heads * a.d;
#pragma omp parallel num_threads(a.threads)
    {
        Head head(m, d);
        std::vector<const T*> query(m), key(m), value(m);
        std::vector<const float*> cos(m), sin(m);
        std::vector<T*> query_map(m), prepared_key(m), output(m);
        std::vector<T> nowhere(d);  // what is written for padding
#pragma omp for
        for (int64_t window = 0; window < a.batch * a.windows; window++) {
            int64_t n = window % a.windows, rows = a.windows / a.across * a.w, columns = a.across * a.w;
            int64_t corner = (window / a.windows * rows + n / a.across * a.w) * columns + n % a.across * a.w;
            const int64_t* places = a.places + n * m;
            if (!ADD && a.cos) {
                for (int i = 0; i < m; i++) {
                    cos[i] = a.cos + a.window_to_token[n * m + i] * (d / 2);
                    sin[i] = a.sin + a.window_to_token[n * m + i] * (d / 2);
                }
                gather(cos.data(), m, d / 2, head.cos);
                gather(sin.data(), m, d / 2, head.sin);
            }
            for (int64_t h = 0; h < a.heads; h++) {
                int next = h + 1 < a.heads ? d : 0;
                for (int i = 0; i < m; i++) {
                    int64_t token = window / a.windows * a.tokens + places[i];
                    int64_t map_place = (corner + i / a.w * columns + i % a.w) * channels + h * d;
                    if (places[i] < 0) {
                        query[i] = nullptr;
                        key[i] = ADD ? (const T*)a.key_of_padding + h * d : nullptr;
                        value[i] = ADD ? (const T*)a.value_of_padding + h * d : nullptr;
                        prepared_key[i] = output[i] = nowhere.data();
                    } else {
                        query[i] = (const T*)a.query + token * a.query_stride + h * d;
                        key[i] = prepared_key[i] = (T*)a.key + token * a.key_stride + h * d;
                        value[i] = (const T*)a.value + token * a.value_stride + h * d;
                        output[i] = (T*)a.output + token * channels + h * d;
                        fetch(key[i] + next, d);
                        fetch(value[i] + next, d);
                        if (ADD) fetch(output[i] + next, d);
                    }
                    if (ADD) query[i] = (const T*)a.query + map_place;
                    if (query[i]) fetch(query[i] + next, d);
                    for (int c = 0; c < d; c += LANES)
                        store(head.value + i * padded(d) + c, value[i] ? load(value[i] + c, d - c) : Vec{});
                    if (!a.query_map) continue;
                    query_map[i] = (T*)a.query_map + map_place;
                    fetch(query_map[i] + next, d);
                }
                gather(query.data(), m, d, head.query);
                gather(key.data(), m, d, head.key);
                if (!ADD) {
                    prepare(head.query, m, d, a.norm_q, a.eps, a.cos ? head.cos : nullptr, head.sin);
                    prepare(head.key, m, d, a.norm_k, a.eps, a.cos ? head.cos : nullptr, head.sin);
                }
                if (!ADD && a.query_map) {
                    scatter(head.query, m, d, query_map.data());
                    scatter(head.key, m, d, prepared_key.data());
                }
                const float *bias = a.bias + h * m * padded(m), *mask = a.mask + n * m * m;
                attend<T, ADD>(head, m, d, bias, mask, a.share, output.data());
            }
        }
    }
}

// Depthwise convolution

// As cpu.py fills it in: GELU(depthwise 3 x 3 convolution) of a part of a map, and its sums over each row.
struct Depthwise {
    const void *map;            // (B, rows, columns, C), contiguous
    const void *above, *below;  // (B, columns, C): the rows next to the part, or null where the map ends
    int64_t above_stride, below_stride;  // of a sample
    const float *weight;        // (9, C)
    void *features;             // (B, rows, columns, C)
    float *sums;                // (B, rows, C), zeros before
    int64_t batch, rows, columns, channels, threads;
};

template <class T> static void depthwise_gelu(const Depthwise& a) {
    int64_t stride = a.columns * a.channels;
#pragma omp parallel for num_threads(a.threads)
    for (int64_t row = 0; row < a.batch * a.rows; row++) {
        int64_t sample = row / a.rows, y = row % a.rows;
        const T* near[3] = {(const T*)a.map + (row - 1) * stride, (const T*)a.map + row * stride,
                            (const T*)a.map + (row + 1) * stride};
        if (y == 0) near[0] = a.above ? (const T*)a.above + sample * a.above_stride : nullptr;
        if (y == a.rows - 1) near[2] = a.below ? (const T*)a.below + sample * a.below_stride : nullptr;
        float* sums = a.sums + row * a.channels;
        for (int64_t x = 0; x < a.columns; x++) {
            T* features = (T*)a.features + row * stride + x * a.channels;
            const T* taps[9];  // null outside of the map
            for (int i = 0; i < 9; i++) {
                int64_t column = x + i % 3 - 1;
                bool inside = near[i / 3] && 0 <= column && column < a.columns;
                taps[i] = inside ? near[i / 3] + column * a.channels : nullptr;
            }
            bool whole = std::find(taps, taps + 9, nullptr) == taps + 9;
            for (int64_t c = 0; c < a.channels; c += LANES) {
                int count = std::min<int64_t>(LANES, a.channels - c);
                Vec sum = {};
                if (whole && count == LANES)  // most of the time, without a question
#pragma GCC unroll 9
                    for (int i = 0; i < 9; i++) sum += load(a.weight + i * a.channels + c) * load(taps[i] + c);
                else
                    for (int i = 0; i < 9; i++)
                        if (taps[i]) sum += load(a.weight + i * a.channels + c, count) * load(taps[i] + c, count);
                sum = gelu(sum);
                store(sums + c, load(sums + c, count) + sum, count);
                store(features + c, sum, count);
            }
        }
    }
}

// Excitation

// As cpu.py fills it in: `features`, (B, places, C), times `gate`, (B, C), in place.
struct Excitation {
    void* features;
    const float* gate;
    int64_t batch, places, channels, threads;
};

template <class T> static void excite(const Excitation& a) {
    constexpr int AHEAD = 4096 / sizeof(T);  // what is asked for meanwhile; in bfloat16 this is half of the time
#pragma omp parallel for num_threads(a.threads)
    for (int64_t place = 0; place < a.batch * a.places; place++) {
        T* features = (T*)a.features + place * a.channels;
        const float* gate = a.gate + place / a.places * a.channels;
        for (int64_t c = 0; c < a.channels; c += LANES) {
            int count = std::min<int64_t>(LANES, a.channels - c);
            __builtin_prefetch(features + c + AHEAD, 1);
            store(features + c, load(features + c, count) * load(gate + c, count), count);
        }
    }
}

extern "C" {
int lanes() { return LANES; }
void local_float32(const Attention* a) { window_attention<float, false>(*a); }
void local_bfloat16(const Attention* a) { window_attention<bfloat16, false>(*a); }
void context_float32(const Attention* a) { window_attention<float, true>(*a); }
void context_bfloat16(const Attention* a) { window_attention<bfloat16, true>(*a); }
void depthwise_gelu_float32(const Depthwise* a) { depthwise_gelu<float>(*a); }
void depthwise_gelu_bfloat16(const Depthwise* a) { depthwise_gelu<bfloat16>(*a); }
void excite_float32(const Excitation* a) { excite<float>(*a); }
void excite_bfloat16(const Excitation* a) { excite<bfloat16>(*a); }
}
