// Copyright 2026 The diffusers_localdit authors. Licensed under the Apache License, Version 2.0.
//
// Shifted-window attention for windows of 4 x 4 tokens and heads of 72 channels in half precision: one warp serves one
// head of one window, all in registers. Triton's kernels (triton_forward.py, triton_backward.py) serve every other case;
// reference.py says what is computed.
//
// A lane is (g, t) = (lane / 4, lane % 4). The matrix instructions m16n8k16 and m16n8k8 want operands spread over the
// lanes in a fixed way, but in a product over channels any order of the channels will do, if both operands have the
// same. Hence a lane holds, of members g and g + 8 of the window, the channels 16t to 16t + 15 and 64 + 2t, 64 + 2t + 1:
// what 16-byte loads bring is an operand as it is. Where members are summed over (values), 8 x 8 numbers are transposed
// between lanes first; what such a product gives is spread over the lanes as what was loaded.
//
// Set by whoever compiles this: HEADS; HALF (half precision with 5 bits of exponent, else bfloat16); PREPARE (queries
// and keys are still to be normalised, and lie in image order), ROTARY, MAPS, RESIDUAL, PADDED (the map has more places
// than the image has tokens), MIN_BLOCKS (that a multiprocessor is to hold, which limits the registers).

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

// Transposes the 8 x 8 numbers that the warp holds: row g, columns 2t and 2t + 1 become row 2t and 2t + 1, column g.
__device__ __forceinline__ word transpose(word x) {
    word y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}

// Lanes may have parted where some of their members are padding.
__device__ __forceinline__ void converge() { __syncwarp(); }
__device__ __forceinline__ float exp2_of(float x) { return exp2f(x); }
#endif

__device__ __forceinline__ float quad_sum(float x) {
    x += from_lane_xor(x, 1);
    return x + from_lane_xor(x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, from_lane_xor(x, 1));
    return fmaxf(x, from_lane_xor(x, 2));
}

// Where a warp's window and head are.
struct Place {
    int head, t, g;
    int top, left;  // of the window on the map
    int seam;       // rows and columns into its window at which the roll starts anew at token 0
    int map_height, map_width;
    int map_row[2], token[2];  // of members g and g + 8
    bool inside[2];            // no padding
    int row[2];                // of the inputs
    bool present[2];           // in them
};

__device__ __forceinline__ Place locate(
    int window, int head, const index_t* map_to_token, const index_t* token_to_window, int tokens, int map_height,
    int map_width
) {
    Place p;
    int lane = threadIdx.x % 32;
    p.head = head;
    p.g = lane / 4;
    p.t = lane % 4;
    p.top = window / (map_width / 4) * 4;
    p.left = window % (map_width / 4) * 4;
    p.seam = (int)token_to_window[0] % 16 / 4;
    p.map_height = map_height;
    p.map_width = map_width;
    for (int a = 0; a < 2; a++) {
        p.map_row[a] = (p.top + p.g / 4 + 2 * a) * map_width + p.left + p.g % 4;
        p.token[a] = (int)map_to_token[p.map_row[a]];
        p.inside[a] = !PADDED || p.token[a] < tokens;
        p.row[a] = PREPARE ? p.token[a] : p.map_row[a];
        p.present[a] = PREPARE ? p.inside[a] : true;
    }
    return p;
}

// A row as described above: channels of one head of one token.
__device__ __forceinline__ void load_row(word* x, const half_bits* row, int t, bool present) {
    if (present) {
        quad first = *(const quad*)(row + 16 * t), second = *(const quad*)(row + 16 * t + 8);
        for (int i = 0; i < 4; i++) { x[i] = first.x[i]; x[4 + i] = second.x[i]; }
        x[8] = *(const word*)(row + 64 + 2 * t);
    } else {
        for (int i = 0; i < WORDS; i++) x[i] = 0;
    }
}

__device__ __forceinline__ void store_row(half_bits* row, const word* x, int t) {
    quad first, second;
    for (int i = 0; i < 4; i++) { first.x[i] = x[i]; second.x[i] = x[4 + i]; }
    *(quad*)(row + 16 * t) = first;
    *(quad*)(row + 16 * t + 8) = second;
    *(word*)(row + 64 + 2 * t) = x[8];
}

// The same of a table in float32, with one number for two channels.
__device__ __forceinline__ void load_table_row(float* x, const float* row, int t, bool present) {
    if (present) {
        for (int i = 0; i < 2; i++) {
            float4 four = *(const float4*)(row + 8 * t + 4 * i);
            x[4 * i] = four.x; x[4 * i + 1] = four.y; x[4 * i + 2] = four.z; x[4 * i + 3] = four.w;
        }
        x[8] = row[32 + t];
    } else {
        for (int i = 0; i < WORDS; i++) x[i] = 0;
    }
}

struct Rotary { float cos[2][WORDS], sin[2][WORDS]; };

__device__ __forceinline__ Rotary load_rotary(const float* cos, const float* sin, const Place& p) {
    Rotary rotary;
    for (int a = 0; a < 2; a++) {
        load_table_row(rotary.cos[a], cos + p.token[a] * (HEAD_DIM / 2), p.t, p.inside[a]);
        load_table_row(rotary.sin[a], sin + p.token[a] * (HEAD_DIM / 2), p.t, p.inside[a]);
    }
    return rotary;
}

// 1 / rms of a row.
__device__ __forceinline__ float norm_factor(const word* x, float eps) {
    float total = 0, low, high;
    for (int i = 0; i < WORDS; i++) {
        unpack(x[i], low, high);
        total += low * low;
        total += high * high;
    }
    return rsqrtf(quad_sum(total) / HEAD_DIM + eps);
}

// Queries or keys as attention takes them: normalised and turned.
__device__ __forceinline__ void prepare(word (*x)[WORDS], const half_bits* norm, const Rotary& rotary, float eps, int t) {
    word weight[WORDS];
    load_row(weight, norm, t, true);
    for (int a = 0; a < 2; a++) {
        float factor = norm_factor(x[a], eps);
        for (int i = 0; i < WORDS; i++) {
            float u, v, weight_u, weight_v;
            unpack(x[a][i], u, v);
            unpack(weight[i], weight_u, weight_v);
            u *= factor * weight_u;
            v *= factor * weight_v;
#if ROTARY
            float c = rotary.cos[a][i], s = rotary.sin[a][i];
            x[a][i] = pack(u * c - v * s, u * s + v * c);
#else
            x[a][i] = pack(u, v);
#endif
        }
    }
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

// Softmax weights of queries g and g + 8 over keys 8n + 2t and 8n + 2t + 1, from their scores.
__device__ __forceinline__ void softmax(float (*scores)[4], const half_bits* table, const Place& p) {
    // Entry of query g + 8a and key 8n + 2t + b: one place for each a - n and b.
    const half_bits* entry = table + p.head
        + ((p.g / 4 - p.t / 2 + 3) * 7 + p.g % 4 - 2 * (p.t % 2) + 3) * HEADS;
    float bias[3][2], high;
    for (int d = 0; d < 3; d++)
        for (int b = 0; b < 2; b++) unpack(entry[(14 * (d - 1) - b) * HEADS], bias[d][b], high);
    for (int n = 0; n < 2; n++)
        for (int i = 0; i < 4; i++) {
            int a = i / 2, b = i % 2;
            scores[n][i] = scores[n][i] * (SCALE * LOG2_E) + bias[a - n + 1][b] * LOG2_E;
        }
    bool seam_below = p.seam > 0 && p.top == p.map_height - 4, seam_right = p.seam > 0 && p.left == p.map_width - 4;
    if (seam_below || seam_right)
        for (int n = 0; n < 2; n++)
            for (int i = 0; i < 4; i++) {
                int a = i / 2, b = i % 2;
                bool below = seam_below && (p.g / 4 + 2 * a >= p.seam) != (p.t / 2 + 2 * n >= p.seam);
                bool right = seam_right && (p.g % 4 >= p.seam) != (2 * (p.t % 2) + b >= p.seam);
                if (below || right) scores[n][i] += MASK_VALUE * LOG2_E;
            }
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

extern "C" __global__ void __launch_bounds__(128, MIN_BLOCKS) window4_forward(
    const half_bits* query, const half_bits* key, const half_bits* value,  // (B, L, C), or (B, M, C) without PREPARE
    const half_bits* norm_q, const half_bits* norm_k,                      // (72,)
    const float* cos, const float* sin,                                    // (L, 36)
    const half_bits* table,                                                // (49, HEADS)
    const index_t* map_to_token, const index_t* token_to_window,           // (M,), (L,)
    const half_bits* residual, half_bits* output,                          // (B, L, C)
    half_bits* query_map, half_bits* key_map,                              // (B, M, C)
    int batch_stride, int token_stride, int tokens, int map_height, int map_width, double eps, double output_scale
) {
    int unit = blockIdx.x * 4 + threadIdx.x / 32;  // heads vary fastest: neighbours in memory run at the same time
    int windows = map_height / 4 * (map_width / 4);
    if (unit >= windows * HEADS) return;
    Place p = locate(unit / HEADS, unit % HEADS, map_to_token, token_to_window, tokens, map_height, map_width);
    index_t in_input = (index_t)blockIdx.y * batch_stride + p.head * HEAD_DIM;
    index_t in_output = (index_t)blockIdx.y * tokens * WIDTH + p.head * HEAD_DIM;
    index_t in_map = (index_t)blockIdx.y * map_height * map_width * WIDTH + p.head * HEAD_DIM;

    word q[2][WORDS], k[2][WORDS], v[2][WORDS];
    for (int a = 0; a < 2; a++) {
        load_row(q[a], query + in_input + (index_t)p.row[a] * token_stride, p.t, p.present[a]);
        load_row(k[a], key + in_input + (index_t)p.row[a] * token_stride, p.t, p.present[a]);
        load_row(v[a], value + in_input + (index_t)p.row[a] * token_stride, p.t, p.present[a]);
    }
#if PREPARE
    Rotary rotary;
#if ROTARY
    rotary = load_rotary(cos, sin, p);
#endif
    prepare(q, norm_q, rotary, eps, p.t);
    prepare(k, norm_k, rotary, eps, p.t);
#endif
#if MAPS
    for (int a = 0; a < 2; a++) {
        store_row(query_map + in_map + (index_t)p.map_row[a] * WIDTH, q[a], p.t);
        store_row(key_map + in_map + (index_t)p.map_row[a] * WIDTH, k[a], p.t);
    }
#endif

    float weights[2][4];
    inner(weights, q, k);
    softmax(weights, table, p);
    word packed[4];
    pack_weights(packed, weights, output_scale);
    float mixed[2][2 * WORDS];
    mix(mixed, packed, v);

    for (int a = 0; a < 2; a++) {
        if (!p.inside[a]) continue;
        word o[WORDS];
        half_bits* out = output + in_output + (index_t)p.token[a] * WIDTH;
#if RESIDUAL
        load_row(o, residual + in_output + (index_t)p.token[a] * WIDTH, p.t, true);
        for (int i = 0; i < WORDS; i++) {
            float low, high;
            unpack(o[i], low, high);
            o[i] = pack(low + mixed[a][2 * i], high + mixed[a][2 * i + 1]);
        }
#else
        for (int i = 0; i < WORDS; i++) o[i] = pack(mixed[a][2 * i], mixed[a][2 * i + 1]);
#endif
        store_row(out, o, p.t);
    }
}

// Gradients of raw queries or keys, from those of what `prepare` gave; of the norm's weight they are added up.
__device__ __forceinline__ void prepare_backward(
    float (*grad)[2 * WORDS], float* grad_norm, const half_bits* x, const half_bits* norm, index_t token_stride,
    const float* cos, const float* sin, float eps, const Place& p
) {
    word weight[WORDS];
    load_row(weight, norm, p.t, true);
#pragma unroll  // or the gradients would lie in memory, to be found by a
    for (int a = 0; a < 2; a++) {
        word raw[WORDS];
        load_row(raw, x + (index_t)p.token[a] * token_stride, p.t, p.inside[a]);
        float factor = norm_factor(raw, eps), along = 0;
#if ROTARY
        float c[WORDS], s[WORDS];
        load_table_row(c, cos + p.token[a] * (HEAD_DIM / 2), p.t, p.inside[a]);
        load_table_row(s, sin + p.token[a] * (HEAD_DIM / 2), p.t, p.inside[a]);
#endif
        for (int i = 0; i < WORDS; i++) {
            float u = grad[a][2 * i], v = grad[a][2 * i + 1], x_u, x_v, weight_u, weight_v;
#if ROTARY
            float turned = u * c[i] + v * s[i];
            v = v * c[i] - u * s[i];
            u = turned;
#endif
            unpack(raw[i], x_u, x_v);
            unpack(weight[i], weight_u, weight_v);
            x_u *= factor;
            x_v *= factor;
            grad_norm[2 * i] += u * x_u;
            grad_norm[2 * i + 1] += v * x_v;
            u *= weight_u;
            v *= weight_v;
            along += u * x_u + v * x_v;
            grad[a][2 * i] = u;
            grad[a][2 * i + 1] = v;
        }
        along = quad_sum(along) / HEAD_DIM;
        for (int i = 0; i < WORDS; i++) {
            float x_u, x_v;
            unpack(raw[i], x_u, x_v);
            grad[a][2 * i] = factor * (grad[a][2 * i] - factor * x_u * along);
            grad[a][2 * i + 1] = factor * (grad[a][2 * i + 1] - factor * x_v * along);
        }
    }
}

__device__ __forceinline__ void add_row(float* x, const half_bits* row, int t) {
    word other[WORDS];
    load_row(other, row, t, true);
    for (int i = 0; i < WORDS; i++) {
        float low, high;
        unpack(other[i], low, high);
        x[2 * i] += low;
        x[2 * i + 1] += high;
    }
}

// Gradients lie where the inputs do: in image order, or on the map without PREPARE.
__device__ __forceinline__ void store_gradient(half_bits* to, const float (*grad)[2 * WORDS], const Place& p) {
    for (int a = 0; a < 2; a++) {
        if (!p.present[a]) continue;
        word packed[WORDS];
        for (int i = 0; i < WORDS; i++) packed[i] = pack(grad[a][2 * i], grad[a][2 * i + 1]);
        store_row(to + (index_t)p.row[a] * WIDTH, packed, p.t);
    }
}

// From the gradients of queries or keys as attention took them to those of the inputs, which are stored.
__device__ __forceinline__ void finish(
    float (*grad)[2 * WORDS], float* grad_norm, const half_bits* x, const half_bits* norm, index_t token_stride,
    const float* cos, const float* sin, float eps, const half_bits* grad_map, half_bits* to, const Place& p
) {
#if MAPS
    for (int a = 0; a < 2; a++) add_row(grad[a], grad_map + (index_t)p.map_row[a] * WIDTH, p.t);
#endif
#if PREPARE
    prepare_backward(grad, grad_norm, x, norm, token_stride, cos, sin, eps, p);
#endif
    store_gradient(to, grad, p);
}

// Sums of the lanes' numbers over g, written by the first of them.
__device__ __forceinline__ void store_norm_gradient(float* to, const float* x, const Place& p) {
    for (int i = 0; i < 2 * WORDS; i++) {
        float total = x[i];
        for (int mask = 4; mask < 32; mask *= 2) total += from_lane_xor(total, mask);
        if (p.g == 0) to[i < 16 ? 16 * p.t + i : 64 + 2 * p.t + i - 16] = total;
    }
}

// Gradients of every window that falls to this warp. Those of norms and bias add up in registers, in a fixed order.
extern "C" __global__ void __launch_bounds__(128, MIN_BLOCKS) window4_backward(
    const half_bits* query, const half_bits* key, const half_bits* value,  // as in the forward pass
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
    int unit = blockIdx.x * 4 + threadIdx.x / 32, head = unit % HEADS, program = unit / HEADS;
    if (program >= programs) return;
    int windows = map_height / 4 * (map_width / 4);
    float scale = output_scale * SCALE;
    float bias_sum[2][4] = {};
    float norm_q_sum[2 * WORDS] = {}, norm_k_sum[2 * WORDS] = {};
    Place p;

    for (int index = program; index < batch_size * windows; index += programs) {
        int batch = index / windows;
        p = locate(index % windows, head, map_to_token, token_to_window, tokens, map_height, map_width);
        const half_bits* in_query = query + (index_t)batch * batch_stride + head * HEAD_DIM;
        const half_bits* in_key = key + (index_t)batch * batch_stride + head * HEAD_DIM;
        const half_bits* in_value = value + (index_t)batch * batch_stride + head * HEAD_DIM;
        index_t in_output = (index_t)batch * tokens * WIDTH + head * HEAD_DIM;
        index_t in_map = (index_t)batch * map_height * map_width * WIDTH + head * HEAD_DIM;
        index_t in_grad = PREPARE ? in_output : in_map;

        word q[2][WORDS], k[2][WORDS], g[2][WORDS];
        float weights[2][4], grad_scores[2][4];
        for (int a = 0; a < 2; a++) {
            load_row(q[a], in_query + (index_t)p.row[a] * token_stride, p.t, p.present[a]);
            load_row(k[a], in_key + (index_t)p.row[a] * token_stride, p.t, p.present[a]);
            load_row(g[a], grad_output + in_output + (index_t)p.token[a] * WIDTH, p.t, p.inside[a]);
        }
        {
            word v[2][WORDS];
            for (int a = 0; a < 2; a++) load_row(v[a], in_value + (index_t)p.row[a] * token_stride, p.t, p.present[a]);
            inner(grad_scores, g, v);  // of the weights, so far
        }
#if PREPARE
        {
            Rotary rotary;
#if ROTARY
            rotary = load_rotary(cos, sin, p);
#endif
            prepare(q, norm_q, rotary, eps, p.t);
            prepare(k, norm_k, rotary, eps, p.t);
        }
#endif
        inner(weights, q, k);
        softmax(weights, table, p);
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
        store_gradient(grad_value + in_grad, grad, p);

        pack_weights(packed, grad_scores, scale);
        transpose_weights(transposed, packed);
        mix(grad, packed, k);
        finish(
            grad, norm_q_sum, in_query, norm_q, token_stride, cos, sin, eps, grad_query_map + in_map,
            grad_query + in_grad, p
        );
        mix(grad, transposed, q);
        finish(grad, norm_k_sum, in_key, norm_k, token_stride, cos, sin, eps, grad_key_map + in_map, grad_key + in_grad, p);
    }

    index_t part = (index_t)program * HEADS + head;
#if PREPARE
    store_norm_gradient(grad_norm + part * HEAD_DIM, norm_q_sum, p);
    store_norm_gradient(grad_norm + ((index_t)programs * HEADS + part) * HEAD_DIM, norm_k_sum, p);
#endif
    for (int n = 0; n < 2; n++)
        for (int i = 0; i < 4; i++)
            grad_bias[part * 256 + (p.g + 8 * (i / 2)) * 16 + 8 * n + 2 * p.t + i % 2] = bias_sum[n][i] * (float)output_scale;
}
