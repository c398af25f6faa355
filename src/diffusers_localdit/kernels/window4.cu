// Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
//
// Shifted-window attention for windows of 4 x 4 tokens and heads of 72 channels in half precision: a warp serves one
// head of one window at a time, all in registers. Triton's kernels (triton_forward.py, triton_backward.py) serve every
// other case; reference.py says what is computed.
//
// A lane is (g, t) = (lane / 4, lane % 4). The matrix instructions m16n8k16 and m16n8k8 want operands spread over the
// lanes in a fixed way, but in a product over channels any order of the channels will do, if both operands have the
// same. Hence a lane holds, of members g and g + 8 of the window, the channels 8t to 8t + 7, 32 + 8t to 39 + 8t, 64 + 2t
// and 65 + 2t: what 16-byte loads bring is an operand as it is, and the four lanes of a row read 64 bytes that follow each
// other. Where members are summed over (values), 8 x 8 numbers are transposed between lanes first; what such a product
// gives is spread over the lanes as what was loaded.
//
// A warp of the local branch or of the backward pass, which have much to compute, serves one window after the other, and
// what the next one needs is copied to shared memory meanwhile. A warp of the context branch's attention serves a single
// one: it computes little, and many warps wait for memory at the same time.
//
// Set by whoever compiles this: one of WINDOW4_LOCAL, WINDOW4_CONTEXT and WINDOW4_BACKWARD; HEADS; HALF (half precision
// with 5 bits of exponent, else bfloat16); PREPARE (queries and keys are still to be normalised, and lie in image order:
// the local branch), ROTARY, MAPS, PADDED (the map has more places than the image has tokens), WARPS (of a block),
// MIN_BLOCKS (that a multiprocessor is to hold, which limits the registers).

#define HEAD_DIM 72
#define SCALE 0.11785113019775793f  // of scores: 72 ** -0.5
#define WIDTH (HEADS * HEAD_DIM)
#define WORDS 9  // of two numbers each, that a lane holds of a row
#define LOG2_E 1.4426950408889634f
#define MASK_VALUE -10000.0f

typedef unsigned int word;  // two numbers in half precision, the first in the lower half
typedef unsigned short half_bits;
typedef long long index_t;

#ifndef EMULATED  // tests/emulated_warp.cpp has these for a CPU
struct alignas(16) quad { word x[4]; };

__device__ __forceinline__ float as_float(word x) { return __uint_as_float(x); }

__device__ __forceinline__ void unpack(word x, float& low, float& high) {
#if HALF
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(low), "=f"(high) : "r"(x));
#else
    low = __uint_as_float(x << 16);
    high = __uint_as_float(x & 0xffff0000u);
#endif
}

__device__ __forceinline__ word pack(float low, float high) {
    word x;
#if HALF
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
#endif
    return x;
}

#if HALF
#define TYPES "f32.f16.f16.f32"
#else
#define TYPES "f32.bf16.bf16.f32"
#endif

__device__ __forceinline__ void multiply16(float* c, word a0, word a1, word a2, word a3, word b0, word b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col." TYPES " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void multiply8(float* c, word a0, word a1, word b0) {
    asm volatile("mma.sync.aligned.m16n8k8.row.col." TYPES " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(b0));
}

__device__ __forceinline__ float from_lane_xor(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ float from_lane(float x, int lane) { return __shfl_sync(0xffffffffu, x, lane); }

// Transposes the 8 x 8 numbers that the warp holds: row g, columns 2t and 2t + 1 become row 2t and 2t + 1, column g.
__device__ __forceinline__ word transpose(word x) {
    word y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Lanes may have parted where some of their members are padding.
__device__ __forceinline__ void converge() { __syncwarp(); }
__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }

// Copies from memory to shared memory on its own, or writes zeros. Memory is read by 32 bytes, rows begin at multiples of
// 16: the nearest cache keeps what the next access, or the next head, needs of the same 32.
__device__ __forceinline__ void copy16(void* to, const void* from, bool present) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;"
        :: "r"((word)__cvta_generic_to_shared(to)), "l"(from), "r"(present ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copy4(void* to, const void* from, bool present) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;"
        :: "r"((word)__cvta_generic_to_shared(to)), "l"(from), "r"(present ? 4 : 0) : "memory");
}

__device__ __forceinline__ void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for the copies of this lane, but for those of the last groups.
#define WAIT_FOR_ALL_GROUPS_BUT(pending) asm volatile("cp.async.wait_group " #pending ";" ::: "memory")
#endif

__device__ __forceinline__ float quad_sum(float x) {
    x += from_lane_xor(x, 1);
    return x + from_lane_xor(x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, from_lane_xor(x, 1));
    return fmaxf(x, from_lane_xor(x, 2));
}

// What is the same for all windows of a warp.
struct Lane {
    int head, t, g;
    const index_t* map_to_token;
    int batch_size, tokens, map_height, map_width;
    int seam;  // rows and columns into its window at which the roll starts anew at token 0
};

__device__ __forceinline__ Lane make_lane(
    int head, const index_t* map_to_token, const index_t* token_to_window, int batch_size, int tokens, int map_height,
    int map_width
) {
    int lane = threadIdx.x % 32;
    return {
        head, lane % 4, lane / 4, map_to_token, batch_size, tokens, map_height, map_width,
        (int)token_to_window[0] % 16 / 4
    };
}

// Where a window is, or how far it is from one to another.
struct Place {
    int batch, top, left;  // on the map
    int token[2];          // of members g and g + 8
};

__device__ __forceinline__ bool exists(const Place& p, const Lane& lane) { return p.batch < lane.batch_size; }

__device__ __forceinline__ int map_row(const Place& p, int a, const Lane& lane) {
    return (p.top + lane.g / 4 + 2 * a) * lane.map_width + p.left + lane.g % 4;
}

__device__ __forceinline__ void find_tokens(Place& p, const Lane& lane) {
    for (int a = 0; a < 2; a++)
        if (exists(p, lane)) p.token[a] = (int)lane.map_to_token[map_row(p, a, lane)];
}

// Window number `index` of all samples, without its tokens.
__device__ __forceinline__ Place window_at(int index, const Lane& lane) {
    int across = lane.map_width / 4, down = lane.map_height / 4, strip = index / across;
    return {strip / down, strip % down * 4, index % across * 4};
}

__device__ __forceinline__ Place following(Place p, const Place& step, const Lane& lane) {
    p.batch += step.batch;
    p.top += step.top;
    p.left += step.left;
    if (p.left >= lane.map_width) { p.left -= lane.map_width; p.top += 4; }
    if (p.top >= lane.map_height) { p.top -= lane.map_height; p.batch += 1; }
    find_tokens(p, lane);
    return p;
}

__device__ __forceinline__ bool inside(const Place& p, int a, const Lane& lane) {  // no padding
    return !PADDED || p.token[a] < lane.tokens;
}

// Whether a member has a row in the inputs, and where it begins there, on a map, in the image, in the inputs' gradients.
__device__ __forceinline__ bool present(const Place& p, int a, const Lane& lane) { return !PREPARE || inside(p, a, lane); }
__device__ __forceinline__ index_t in_input(
    const Place& p, int a, int batch_stride, int token_stride, const Lane& lane
) {
    int row = PREPARE ? p.token[a] : map_row(p, a, lane);
    return (index_t)p.batch * batch_stride + (index_t)row * token_stride + lane.head * HEAD_DIM;
}
__device__ __forceinline__ index_t on_map(const Place& p, int a, const Lane& lane) {
    return ((index_t)p.batch * (lane.map_height * lane.map_width) + map_row(p, a, lane)) * WIDTH + lane.head * HEAD_DIM;
}
__device__ __forceinline__ index_t in_image(const Place& p, int a, const Lane& lane) {
    return ((index_t)p.batch * lane.tokens + p.token[a]) * WIDTH + lane.head * HEAD_DIM;
}
__device__ __forceinline__ index_t in_gradient(const Place& p, int a, const Lane& lane) {
    return PREPARE ? in_image(p, a, lane) : on_map(p, a, lane);
}

// A row as described above: channels of one head of one token. A row of a table in float32 has as many words, one for
// two channels.
__device__ __forceinline__ void load_row(word* x, const void* row, int t, bool present) {
    const word* words = (const word*)row;
    if (present) {
        quad first = *(const quad*)(words + 4 * t), second = *(const quad*)(words + 16 + 4 * t);
        for (int i = 0; i < 4; i++) { x[i] = first.x[i]; x[4 + i] = second.x[i]; }
        x[8] = words[32 + t];
    } else {
        for (int i = 0; i < WORDS; i++) x[i] = 0;
    }
}

__device__ __forceinline__ void store_row(half_bits* row, const word* x, int t) {
    word* words = (word*)row;
    quad first, second;
    for (int i = 0; i < 4; i++) { first.x[i] = x[i]; second.x[i] = x[4 + i]; }
    *(quad*)(words + 4 * t) = first;
    *(quad*)(words + 16 + 4 * t) = second;
    words[32 + t] = x[8];
}

// A row of each lane, copied ahead. A lane reads what it copied itself, so that lanes need not wait for each other.
struct Staged { quad first[32], second[32]; word last[32]; };

__device__ __forceinline__ void copy_row(Staged& to, const void* row, bool present) {
    int lane = threadIdx.x % 32, t = lane % 4;
    const word* words = (const word*)row;
    copy16(&to.first[lane], words + 4 * t, present);
    copy16(&to.second[lane], words + 16 + 4 * t, present);
    copy4(&to.last[lane], words + 32 + t, present);
}

__device__ __forceinline__ void read_row(word* x, const Staged& from) {
    int lane = threadIdx.x % 32;
    quad first = from.first[lane], second = from.second[lane];
    for (int i = 0; i < 4; i++) { x[i] = first.x[i]; x[4 + i] = second.x[i]; }
    x[8] = from.last[lane];
}

// Both rows of a lane.
__device__ __forceinline__ void read_rows(word (*x)[WORDS], const Staged* from) {
    for (int a = 0; a < 2; a++) read_row(x[a], from[a]);
}

struct Rotary { word cos[2][WORDS], sin[2][WORDS]; };

__device__ __forceinline__ Rotary load_rotary(const float* cos, const float* sin, const Place& p, const Lane& lane) {
    Rotary rotary;
    for (int a = 0; a < 2; a++) {
        load_row(rotary.cos[a], cos + p.token[a] * (HEAD_DIM / 2), lane.t, inside(p, a, lane));
        load_row(rotary.sin[a], sin + p.token[a] * (HEAD_DIM / 2), lane.t, inside(p, a, lane));
    }
    return rotary;
}

// left right^T, two products of rows: rows g and g + 8, columns 8n + 2t and 8n + 2t + 1, n = 0 and 1.
__device__ __forceinline__ void inner(float (*c)[4], const word (*left)[WORDS], const word (*right)[WORDS]) {
    converge();
    for (int n = 0; n < 2; n++) {
        for (int i = 0; i < 4; i++) c[n][i] = 0;
        for (int s = 0; s < 4; s++)
            multiply16(
                c[n], left[0][2 * s], left[1][2 * s], left[0][2 * s + 1], left[1][2 * s + 1], right[n][2 * s],
                right[n][2 * s + 1]
            );
        multiply8(c[n], left[0][8], left[1][8], right[n][8]);
    }
}

// 1 / rms of both rows. Their squares are on the diagonal of x x^T, which takes fewer instructions than to square and sum.
__device__ __forceinline__ void norm_factors(float* factors, const word (*x)[WORDS], float eps, const Lane& lane) {
    float squares[2][4];
    inner(squares, x, x);
    for (int a = 0; a < 2; a++) {
        float square = lane.g % 2 ? squares[a][2 * a + 1] : squares[a][2 * a];
        factors[a] = rsqrtf(from_lane(square, 4 * lane.g + lane.g / 2) / HEAD_DIM + eps);
    }
}

// Queries or keys as attention takes them: normalised and turned. With `late` not yet by the factors of the norm.
__device__ __forceinline__ void prepare(
    word (*x)[WORDS], float* factors, const half_bits* norm, const Rotary& rotary, float eps, bool late, const Lane& lane
) {
    word weight[WORDS];
    load_row(weight, norm, lane.t, true);
    norm_factors(factors, x, eps, lane);
    for (int a = 0; a < 2; a++) {
        float factor = late ? 1.0f : factors[a];
        for (int i = 0; i < WORDS; i++) {
            float u, v, weight_u, weight_v;
            unpack(x[a][i], u, v);
            unpack(weight[i], weight_u, weight_v);
            u *= factor * weight_u;
            v *= factor * weight_v;
#if ROTARY
            float c = as_float(rotary.cos[a][i]), s = as_float(rotary.sin[a][i]);
            x[a][i] = pack(u * c - v * s, u * s + v * c);
#else
            x[a][i] = pack(u, v);
#endif
        }
    }
}

// Scores by the factors of queries g and g + 8 and of keys 8n + 2t and 8n + 2t + 1.
__device__ __forceinline__ void multiply_factors(
    float (*scores)[4], const float* query_factors, const float* key_factors, const Lane& lane
) {
    for (int n = 0; n < 2; n++)
        for (int b = 0; b < 2; b++) {
            float factor = from_lane(key_factors[n], 4 * (2 * lane.t + b));
            for (int a = 0; a < 2; a++) scores[n][2 * a + b] *= query_factors[a] * factor;
        }
}

// Of the scores of queries g and g + 8 and keys 8n + 2t and 8n + 2t + 1: what is added to them.
struct Bias {
    float entry[3][2];   // of query g + 8a and key 8n + 2t + b, for each a - n + 1 and b
    int below, right;    // bits 4n + 2a + b: which pairs a seam parts that runs through the window
};

__device__ __forceinline__ Bias load_bias(const half_bits* table, const Lane& lane) {
    Bias bias = {};
    int g = lane.g, t = lane.t;
    const half_bits* entry = table + lane.head + ((g / 4 - t / 2 + 3) * 7 + g % 4 - 2 * (t % 2) + 3) * HEADS;
    for (int d = 0; d < 3; d++)
        for (int b = 0; b < 2; b++) {
            float low, high;
            unpack(entry[(14 * (d - 1) - b) * HEADS], low, high);
            bias.entry[d][b] = low * LOG2_E;
        }
    for (int n = 0; n < 2; n++)
        for (int i = 0; i < 4; i++) {
            int a = i / 2, b = i % 2;
            bool below = (g / 4 + 2 * a >= lane.seam) != (t / 2 + 2 * n >= lane.seam);
            bool right = (g % 4 >= lane.seam) != (2 * (t % 2) + b >= lane.seam);
            bias.below |= below << (4 * n + i);
            bias.right |= right << (4 * n + i);
        }
    return bias;
}

// Softmax weights of queries g and g + 8 over keys 8n + 2t and 8n + 2t + 1, from their scores.
__device__ __forceinline__ void softmax(float (*scores)[4], const Bias& bias, const Place& p, const Lane& lane) {
    for (int n = 0; n < 2; n++)
        for (int i = 0; i < 4; i++)
            scores[n][i] = scores[n][i] * (SCALE * LOG2_E) + bias.entry[i / 2 - n + 1][i % 2];
    int parted = 0;
    if (p.top == lane.map_height - 4) parted |= bias.below;
    if (p.left == lane.map_width - 4) parted |= bias.right;
    if (parted)
        for (int n = 0; n < 2; n++)
            for (int i = 0; i < 4; i++)
                if (parted >> (4 * n + i) & 1) scores[n][i] += MASK_VALUE * LOG2_E;
    for (int a = 0; a < 2; a++) {
        float most = quad_max(
            fmaxf(fmaxf(scores[0][2 * a], scores[0][2 * a + 1]), fmaxf(scores[1][2 * a], scores[1][2 * a + 1]))
        );
        float total = 0;
        for (int n = 0; n < 2; n++)
            for (int b = 0; b < 2; b++) {
                scores[n][2 * a + b] = exp2_of(scores[n][2 * a + b] - most);
                total += scores[n][2 * a + b];
            }
        total = 1 / quad_sum(total);
        for (int n = 0; n < 2; n++)
            for (int b = 0; b < 2; b++) scores[n][2 * a + b] *= total;
    }
}

// Sums of rows by weights, whose words are the operand (rows 0 to 15, columns 0 to 15): output[a] is row g + 8a.
__device__ __forceinline__ void mix(float (*output)[2 * WORDS], const word* weights, const word (*x)[WORDS]) {
    converge();
    for (int i = 0; i < WORDS; i++) {
        float c[4] = {0, 0, 0, 0};
        multiply16(c, weights[0], weights[1], weights[2], weights[3], transpose(x[0][i]), transpose(x[1][i]));
        for (int a = 0; a < 2; a++) {
            output[a][2 * i] = c[2 * a];
            output[a][2 * i + 1] = c[2 * a + 1];
        }
    }
}

// A product of rows as the left operand of the next.
__device__ __forceinline__ void pack_weights(word* packed, const float (*x)[4], float scale) {
    for (int n = 0; n < 2; n++)
        for (int a = 0; a < 2; a++) packed[2 * n + a] = pack(scale * x[n][2 * a], scale * x[n][2 * a + 1]);
}

__device__ __forceinline__ void transpose_weights(word* transposed, const word* packed) {
    for (int n = 0; n < 2; n++)
        for (int a = 0; a < 2; a++) transposed[2 * a + n] = transpose(packed[2 * n + a]);
}

__device__ __forceinline__ void add_rows(float (*x)[2 * WORDS], const word (*rows)[WORDS]) {
    for (int a = 0; a < 2; a++)
        for (int i = 0; i < WORDS; i++) {
            float low, high;
            unpack(rows[a][i], low, high);
            x[a][2 * i] += low;
            x[a][2 * i + 1] += high;
        }
}

// The attention of a window: output_scale times the sums of its values.
__device__ __forceinline__ void attend(
    float (*mixed)[2 * WORDS], float (*scores)[4], const word (*v)[WORDS], const Bias& bias, double output_scale,
    const Place& p, const Lane& lane
) {
    word packed[4];
    softmax(scores, bias, p, lane);
    pack_weights(packed, scores, output_scale);
    mix(mixed, packed, v);
}

__device__ __forceinline__ void store_numbers(half_bits* row, const float* x, int t) {
    word packed[WORDS];
    for (int i = 0; i < WORDS; i++) packed[i] = pack(x[2 * i], x[2 * i + 1]);
    store_row(row, packed, t);
}

// To the tokens' own places.
__device__ __forceinline__ void store_output(
    half_bits* output, const float (*mixed)[2 * WORDS], const Place& p, const Lane& lane
) {
    for (int a = 0; a < 2; a++)
        if (inside(p, a, lane)) store_numbers(output + in_image(p, a, lane), mixed[a], lane.t);
}

#ifdef WINDOW4_LOCAL
// A warp serves the windows of one head with a stride of `programs`.
extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) window4_local(
    const half_bits* query, const half_bits* key, const half_bits* value,  // (B, L, C)
    const half_bits* norm_q, const half_bits* norm_k,                      // (72,)
    const float* cos, const float* sin,                                    // (L, 36)
    const half_bits* table,                                                // (49, HEADS)
    const index_t* map_to_token, const index_t* token_to_window,           // (M,), (L,)
    half_bits* output,                                                     // (B, L, C)
    half_bits* query_map, half_bits* key_map,                              // (B, M, C)
    int programs, int batch_size, int batch_stride, int token_stride, int tokens, int map_height, int map_width,
    double eps, double output_scale
) {
    __shared__ Staged staged[WARPS][6];
    int unit = blockIdx.x * WARPS + threadIdx.x / 32, program = unit / HEADS;  // heads vary fastest, as in memory
    if (program >= programs) return;
    Lane lane = make_lane(unit % HEADS, map_to_token, token_to_window, batch_size, tokens, map_height, map_width);
    Staged* rows = staged[threadIdx.x / 32];
    const bool late = !MAPS && !HALF;  // without the factors, numbers could leave the range of 5 bits of exponent

    auto copy_ahead = [&](const Place& p) {
        for (int a = 0; a < 2; a++) {
            index_t at = in_input(p, a, batch_stride, token_stride, lane);
            copy_row(rows[a], query + at, present(p, a, lane));
            copy_row(rows[2 + a], key + at, present(p, a, lane));
            copy_row(rows[4 + a], value + at, present(p, a, lane));
        }
        close_group();
    };
    // The tokens of a window are found one window before its rows are copied.
    Place p = window_at(program, lane), step = window_at(programs, lane);
    find_tokens(p, lane);
    copy_ahead(p);
    Place next = following(p, step, lane);
    Bias bias = load_bias(table, lane);

    while (exists(p, lane)) {
        word q[2][WORDS], k[2][WORDS], v[2][WORDS];
        WAIT_FOR_ALL_GROUPS_BUT(0);
        read_rows(q, rows);
        read_rows(k, rows + 2);
        Rotary rotary;
#if ROTARY
        rotary = load_rotary(cos, sin, p, lane);
#endif
        float query_factors[2], key_factors[2];
        prepare(q, query_factors, norm_q, rotary, eps, late, lane);
        prepare(k, key_factors, norm_k, rotary, eps, late, lane);
        read_rows(v, rows + 4);
        if (exists(next, lane)) copy_ahead(next);
        Place after = following(next, step, lane);
#if MAPS
        for (int a = 0; a < 2; a++) {
            store_row(query_map + on_map(p, a, lane), q[a], lane.t);
            store_row(key_map + on_map(p, a, lane), k[a], lane.t);
        }
#endif
        float scores[2][4], mixed[2][2 * WORDS];
        inner(scores, q, k);
        if (late) multiply_factors(scores, query_factors, key_factors, lane);
        attend(mixed, scores, v, bias, output_scale, p, lane);
        store_output(output, mixed, p, lane);
        p = next;
        next = after;
    }
}
#endif

#ifdef WINDOW4_CONTEXT
// A block serves WARPS windows and heads of a row of windows of a sample: blockIdx.y and blockIdx.z.
extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) window4_context(
    const half_bits* query, const half_bits* key, const half_bits* value,  // (B, M, C)
    const half_bits* table, const index_t* map_to_token, const index_t* token_to_window,
    const half_bits* residual, half_bits* output,                          // (B, L, C)
    int batch_size, int batch_stride, int token_stride, int tokens, int map_height, int map_width, double output_scale
) {
    int unit = blockIdx.x * WARPS + threadIdx.x / 32, column = unit / HEADS;
    if (column >= map_width / 4) return;
    Lane lane = make_lane(unit % HEADS, map_to_token, token_to_window, batch_size, tokens, map_height, map_width);
    Place p = {(int)blockIdx.z, (int)blockIdx.y * 4, column * 4};
    find_tokens(p, lane);

    word q[2][WORDS], k[2][WORDS], v[2][WORDS], r[2][WORDS];
    for (int a = 0; a < 2; a++) {
        index_t at = in_input(p, a, batch_stride, token_stride, lane);
        load_row(q[a], query + at, lane.t, true);
        load_row(k[a], key + at, lane.t, true);
        load_row(v[a], value + at, lane.t, true);
        load_row(r[a], residual + in_image(p, a, lane), lane.t, inside(p, a, lane));
    }
    Bias bias = load_bias(table, lane);
    float scores[2][4], mixed[2][2 * WORDS];
    inner(scores, q, k);
    attend(mixed, scores, v, bias, output_scale, p, lane);
    add_rows(mixed, r);
    store_output(output, mixed, p, lane);
}
#endif

#ifdef WINDOW4_BACKWARD
// Gradients of raw queries or keys, from those of what `prepare` gave; of the norm's weight they are added up.
__device__ __forceinline__ void prepare_backward(
    float (*grad)[2 * WORDS], float* grad_norm, const Staged* rows, const float* factors, const half_bits* norm,
    const float* cos, const float* sin, const Place& p, const Lane& lane
) {
    word weight[WORDS];
    load_row(weight, norm, lane.t, true);
#pragma unroll  // or the gradients would lie in memory, to be found by a
    for (int a = 0; a < 2; a++) {
        word raw[WORDS];
        read_row(raw, rows[a]);
        float along = 0;
#if ROTARY
        word c[WORDS], s[WORDS];
        load_row(c, cos + p.token[a] * (HEAD_DIM / 2), lane.t, inside(p, a, lane));
        load_row(s, sin + p.token[a] * (HEAD_DIM / 2), lane.t, inside(p, a, lane));
#endif
        for (int i = 0; i < WORDS; i++) {
            float u = grad[a][2 * i], v = grad[a][2 * i + 1], x_u, x_v, weight_u, weight_v;
#if ROTARY
            float turned = u * as_float(c[i]) + v * as_float(s[i]);
            v = v * as_float(c[i]) - u * as_float(s[i]);
            u = turned;
#endif
            unpack(raw[i], x_u, x_v);
            unpack(weight[i], weight_u, weight_v);
            u *= factors[a];
            v *= factors[a];
            grad_norm[2 * i] += u * x_u;
            grad_norm[2 * i + 1] += v * x_v;
            u *= weight_u;
            v *= weight_v;
            along += u * x_u;
            along += v * x_v;
            grad[a][2 * i] = u;
            grad[a][2 * i + 1] = v;
        }
        along = quad_sum(along) * (factors[a] * factors[a] / HEAD_DIM);
        for (int i = 0; i < WORDS; i++) {
            float x_u, x_v;
            unpack(raw[i], x_u, x_v);
            grad[a][2 * i] -= x_u * along;
            grad[a][2 * i + 1] -= x_v * along;
        }
    }
}

// Gradients lie where the inputs do: in image order, or on the map without PREPARE.
__device__ __forceinline__ void store_gradient(
    half_bits* to, const float (*grad)[2 * WORDS], const Place& p, const Lane& lane
) {
    for (int a = 0; a < 2; a++)
        if (present(p, a, lane)) store_numbers(to + in_gradient(p, a, lane), grad[a], lane.t);
}

__device__ __forceinline__ void add_staged(float (*x)[2 * WORDS], const Staged* from) {
    word rows[2][WORDS];
    read_rows(rows, from);
    add_rows(x, rows);
}

// Sums over g of the numbers that lanes have for their channels, through shared memory of 33 x 18 numbers.
__device__ __forceinline__ void store_norm_gradient(float* to, const float* x, float* shared) {
    int lane = threadIdx.x % 32;
    converge();
    for (int i = 0; i < 2 * WORDS; i++) shared[33 * i + lane] = x[i];
    converge();
    for (int channel = lane; channel < HEAD_DIM; channel += 32) {
        int rest = channel - 64, t = rest < 0 ? channel % 32 / 8 : rest / 2;
        int i = rest < 0 ? channel / 32 * 8 + channel % 8 : 16 + rest % 2;
        float total = 0;
        for (int g = 0; g < 8; g++) total += shared[33 * i + 4 * g + t];
        to[channel] = total;
    }
}

// Gradients of the parameters add up in registers, in a fixed order.
extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS) window4_backward(
    const half_bits* query, const half_bits* key, const half_bits* value,  // (B, L, C), or (B, M, C) without PREPARE
    const half_bits* grad_output,                                          // (B, L, C)
    const half_bits* norm_q, const half_bits* norm_k, const float* cos, const float* sin, const half_bits* table,
    const index_t* map_to_token, const index_t* token_to_window,
    const half_bits* grad_query_map, const half_bits* grad_key_map,       // (B, M, C)
    half_bits* grad_query, half_bits* grad_key, half_bits* grad_value,    // (B, L, C), or (B, M, C) without PREPARE
    float* grad_norm,                                                     // (2, programs, HEADS, 72)
    float* grad_bias,                                                     // (programs, HEADS, 16, 16)
    int programs, int batch_size, int batch_stride, int token_stride, int tokens, int map_height, int map_width,
    double eps, double output_scale
) {
    __shared__ Staged staged[2][WARPS][8];  // of the window that is served and of the next one
#if MAPS
    __shared__ Staged staged_maps[WARPS][4];
    Staged* maps = staged_maps[threadIdx.x / 32];
#endif
    int unit = blockIdx.x * WARPS + threadIdx.x / 32, program = unit / HEADS;
    if (program >= programs) return;
    Lane lane = make_lane(unit % HEADS, map_to_token, token_to_window, batch_size, tokens, map_height, map_width);
    float scale = output_scale * SCALE;
    float bias_sum[2][4] = {};
    float norm_q_sum[2 * WORDS] = {}, norm_k_sum[2 * WORDS] = {};

    auto copy_ahead = [&](Staged* rows, const Place& p) {
        for (int a = 0; a < 2; a++) {
            index_t at = in_input(p, a, batch_stride, token_stride, lane);
            copy_row(rows[a], query + at, present(p, a, lane));
            copy_row(rows[2 + a], key + at, present(p, a, lane));
            copy_row(rows[4 + a], value + at, present(p, a, lane));
            copy_row(rows[6 + a], grad_output + in_image(p, a, lane), inside(p, a, lane));
        }
    };
    Place p = window_at(program, lane), step = window_at(programs, lane);
    find_tokens(p, lane);
    int side = 0;
    copy_ahead(staged[side][threadIdx.x / 32], p);
    close_group();
    Place next = following(p, step, lane);
    Bias bias = load_bias(table, lane);

    while (exists(p, lane)) {
        const Staged* rows = staged[side][threadIdx.x / 32];
        Rotary rotary;
#if PREPARE && ROTARY
        rotary = load_rotary(cos, sin, p, lane);
#endif
        WAIT_FOR_ALL_GROUPS_BUT(0);
#if MAPS
        for (int a = 0; a < 2; a++) {
            copy_row(maps[a], grad_query_map + on_map(p, a, lane), true);
            copy_row(maps[2 + a], grad_key_map + on_map(p, a, lane), true);
        }
        close_group();
#endif
        side ^= 1;
        if (exists(next, lane)) copy_ahead(staged[side][threadIdx.x / 32], next);
        close_group();
        Place after = following(next, step, lane);

        word q[2][WORDS], k[2][WORDS], g[2][WORDS];
        float weights[2][4], grad_scores[2][4];
        read_rows(g, rows + 6);
        {
            word v[2][WORDS];
            read_rows(v, rows + 4);
            inner(grad_scores, g, v);  // of the weights, so far
        }
        read_rows(q, rows);
        read_rows(k, rows + 2);
#if PREPARE
        float query_factors[2], key_factors[2];
        prepare(q, query_factors, norm_q, rotary, eps, false, lane);
        prepare(k, key_factors, norm_k, rotary, eps, false, lane);
#endif
        inner(weights, q, k);
        softmax(weights, bias, p, lane);
        for (int a = 0; a < 2; a++) {
            float average = 0;
            for (int n = 0; n < 2; n++)
                for (int i = 2 * a; i < 2 * a + 2; i++) average += weights[n][i] * grad_scores[n][i];
            average = quad_sum(average);
            for (int n = 0; n < 2; n++)
                for (int i = 2 * a; i < 2 * a + 2; i++) {
                    grad_scores[n][i] = weights[n][i] * (grad_scores[n][i] - average);
                    bias_sum[n][i] += grad_scores[n][i];
                }
        }

        word packed[4], transposed[4];
        float grad[2][2 * WORDS];
        pack_weights(packed, weights, output_scale);
        transpose_weights(transposed, packed);
        mix(grad, transposed, g);
        store_gradient(grad_value, grad, p, lane);

        pack_weights(packed, grad_scores, scale);
        transpose_weights(transposed, packed);
        mix(grad, packed, k);
#if MAPS
        WAIT_FOR_ALL_GROUPS_BUT(1);
        add_staged(grad, maps);
#endif
#if PREPARE
        prepare_backward(grad, norm_q_sum, rows, query_factors, norm_q, cos, sin, p, lane);
#endif
        store_gradient(grad_query, grad, p, lane);

        mix(grad, transposed, q);
#if MAPS
        add_staged(grad, maps + 2);
#endif
#if PREPARE
        prepare_backward(grad, norm_k_sum, rows + 2, key_factors, norm_k, cos, sin, p, lane);
#endif
        store_gradient(grad_key, grad, p, lane);
        p = next;
        next = after;
    }

    index_t part = (index_t)program * HEADS + lane.head;
#if PREPARE
    float* shared = (float*)staged[0][threadIdx.x / 32];
    store_norm_gradient(grad_norm + part * HEAD_DIM, norm_q_sum, shared);
    store_norm_gradient(grad_norm + ((index_t)programs * HEADS + part) * HEAD_DIM, norm_k_sum, shared);
#endif
    for (int n = 0; n < 2; n++)
        for (int i = 0; i < 4; i++)
            grad_bias[part * 256 + (lane.g + 8 * (i / 2)) * 16 + 8 * n + 2 * lane.t + i % 2]
                = bias_sum[n][i] * (float)output_scale;
}
#endif
