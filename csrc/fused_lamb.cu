// LAMB over flat buffers: You et al., "Large Batch Optimization for Deep Learning" (arXiv 1904.00962), algorithm 2.
//
// One source for NVRTC and nvcc: plain C++, extern "C", no headers. A block size of any power of two is right.
//
// Buffers. Every parameter tensor is a segment of the flat fp32 buffers (gradient, master, exp_avg, exp_avg_sq) at the
// same offset in each; segments start at a multiple of 8 elements, and buffers at a multiple of 16 bytes. Segments of
// bf16 or fp16 parameters come first, so that `low`, their 16-bit copy, has the same offsets and covers only them.
// A segment is cut into chunks of a fixed size. One block works on one chunk, so a norm is the sum of its chunks'
// partial sums, added in fixed order: no atomics, the same bits every time. All sizes and offsets are 64 bits wide.
//
// Kernels, in order, and the bytes that they move per parameter:
//   lamb_square_gradients  reads g                                        4
//   lamb_prepare           global norm, clipping, overflow, step counts   -
//   lamb_moments           reads g, p, m, v; writes m, v                 24   partial sums of |p|^2 and |u|^2
//   lamb_norms             |p|^2 and |u|^2 of every segment               -
//   lamb_apply             reads m, v, p; writes p and its 16-bit copy   18   u is computed again, never stored
//                                                                  total 46   (44 without the 16-bit copy)
// Where segments are shards of tensors, the host adds up two results over the processes on their way: the sum of the
// gradients' squares before lamb_prepare, which then gets one number as `partial`, and the norms before lamb_apply.
// A process may own no chunk: only lamb_prepare and lamb_norms run there, and the norms are zero.
//
// The gradient is only read. When its norm is not finite, lamb_prepare raises `skip` before anything was written, and
// the kernels after it leave everything as it is.

struct Chunk {
    long long start;    // first element, counted from the start of the buffers
    long long length;   // elements
    long long segment;
};

// What the host sets for a parameter group. Double, because 1 - beta and beta^step lose digits in float.
struct Group {
    double lr, beta1, beta2, beta3, eps, weight_decay;
    double bias_correction;  // 0 or 1
    double decoupled;        // 1: weight decay is part of the update; 0: it is added to the gradient
    double adaptive;         // 1: the learning rate is multiplied by the trust ratio |p| / |u|
};

// What lamb_prepare derives for a segment and this step.
struct Step {
    float gradient_factor;  // 1 / (loss scale * clipping)
    float beta1, beta2, beta3, one_minus_beta2;
    float m_factor, v_factor;  // bias corrections: 1 / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
    float eps, l2, decay;
};

#define LARGEST_FLOAT 3.402823466e38

// Sum of `value` over the block, in a fixed order, returned to every thread.
__device__ __forceinline__ double sum_over_block(double value) {
    __shared__ double values[1024];
    __syncthreads();  // a former sum may still be in use
    values[threadIdx.x] = value;
    __syncthreads();
    for (unsigned int half = blockDim.x / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) values[threadIdx.x] += values[threadIdx.x + half];
        __syncthreads();
    }
    return values[0];
}

__device__ __forceinline__ float compute_update(const Step& step, float p, float m, float v) {
    return m * step.m_factor / (sqrtf(v) * step.v_factor + step.eps) + step.decay * p;
}

// One element of the first pass: new moments in place, squares of p and u added to the sums.
__device__ __forceinline__ void update_moments(
    const Step& step, float g, float p, float& m, float& v, float& p_squares, float& u_squares
) {
    g = g * step.gradient_factor + step.l2 * p;
    m = step.beta1 * m + step.beta3 * g;
    v = step.beta2 * v + step.one_minus_beta2 * g * g;
    const float u = compute_update(step, p, m, v);
    p_squares += p * p;
    u_squares += u * u;
}

// Round to nearest, ties to even.
__device__ __forceinline__ unsigned short round_to_bf16(float value) {
    const unsigned int bits = __float_as_uint(value);
    if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return (unsigned short)((bits >> 16) | 0x40u);  // NaN stays NaN
    return (unsigned short)((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

__device__ __forceinline__ unsigned short round_to_fp16(float value) {
    const unsigned int bits = __float_as_uint(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
    unsigned int half;
    if (magnitude > 0x7F800000u) {
        half = 0x7E00u;  // NaN
    } else if (magnitude >= 0x477FF000u) {
        half = 0x7C00u;  // from 65520 on: infinity
    } else if (magnitude < 0x38800000u) {
        // Below 2^-14 the unit is 2^-24, which is the unit of a float in [0.5, 1): adding 0.5 rounds there.
        half = __float_as_uint(__uint_as_float(magnitude) + 0.5f) - 0x3F000000u;
    } else {
        // 13 bits fewer in the mantissa; the exponent's bias goes from 127 to 15.
        half = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    }
    return (unsigned short)(sign | half);
}

__device__ __forceinline__ unsigned short round_to_16_bits(float value, int is_fp16) {
    return is_fp16 ? round_to_fp16(value) : round_to_bf16(value);
}

// partial[chunk] = sum of the squares of the gradient; 0 where the segment has no gradient in this step.
extern "C" __global__ void __launch_bounds__(256) lamb_square_gradients(
    const float* __restrict__ gradient, const Chunk* __restrict__ chunks, const int* __restrict__ active,
    double* __restrict__ partial
) {
    const Chunk chunk = chunks[blockIdx.x];
    float x = 0, y = 0, z = 0, w = 0;
    if (active[chunk.segment]) {
        const float* g = gradient + chunk.start;
        const long long vectors = chunk.length / 4;
#pragma unroll 4
        for (long long i = threadIdx.x; i < vectors; i += blockDim.x) {
            const float4 g4 = ((const float4*)g)[i];
            x += g4.x * g4.x;
            y += g4.y * g4.y;
            z += g4.z * g4.z;
            w += g4.w * g4.w;
        }
        for (long long i = vectors * 4 + threadIdx.x; i < chunk.length; i += blockDim.x) x += g[i] * g[i];
    }
    const double sum = sum_over_block((double)x + (double)y + (double)z + (double)w);
    if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// One block. Sets `skip`, `grad_norm`, `num_skipped`; unless the step is skipped, counts it and fills `steps`.
// `grad_scale` may be null; max_grad_norm <= 0 means no clipping.
extern "C" __global__ void __launch_bounds__(1024) lamb_prepare(
    const double* __restrict__ partial, long long num_chunks, const Group* __restrict__ groups,
    const long long* __restrict__ segment_group, const int* __restrict__ active, long long num_segments,
    double max_grad_norm, const float* __restrict__ grad_scale, float* __restrict__ step_count,
    Step* __restrict__ steps, int* __restrict__ skip, float* __restrict__ grad_norm, long long* __restrict__ num_skipped
) {
    double squares = 0;
    for (long long i = threadIdx.x; i < num_chunks; i += blockDim.x) squares += partial[i];
    const double scale = grad_scale ? (double)*grad_scale : 1.0;
    const double norm = sqrt(sum_over_block(squares)) / fabs(scale);
    const bool is_finite = norm <= LARGEST_FLOAT;  // false for NaN too
    if (threadIdx.x == 0) {
        *skip = !is_finite;
        *grad_norm = (float)norm;
        if (!is_finite) *num_skipped += 1;
    }
    if (!is_finite) return;
    const double clip = max_grad_norm > 0 && norm > max_grad_norm ? norm / max_grad_norm : 1.0;
    for (long long i = threadIdx.x; i < num_segments; i += blockDim.x) {
        if (!active[i]) continue;
        const Group group = groups[segment_group[i]];
        const float count = step_count[i] + 1;
        step_count[i] = count;
        Step step;
        step.gradient_factor = (float)(1.0 / (scale * clip));
        step.beta1 = (float)group.beta1;
        step.beta2 = (float)group.beta2;
        step.beta3 = (float)group.beta3;
        step.one_minus_beta2 = (float)(1.0 - group.beta2);
        step.m_factor = group.bias_correction != 0 ? (float)(1.0 / (1.0 - pow(group.beta1, (double)count))) : 1.0f;
        step.v_factor = group.bias_correction != 0 ? (float)rsqrt(1.0 - pow(group.beta2, (double)count)) : 1.0f;
        step.eps = (float)group.eps;
        step.l2 = group.decoupled != 0 ? 0.0f : (float)group.weight_decay;
        step.decay = group.decoupled != 0 ? (float)group.weight_decay : 0.0f;
        steps[i] = step;
    }
}

// New moments, and partial[2 * chunk] = sum of p^2, partial[2 * chunk + 1] = sum of u^2.
extern "C" __global__ void __launch_bounds__(256) lamb_moments(
    const float* __restrict__ gradient, const float* __restrict__ master, float* __restrict__ exp_avg,
    float* __restrict__ exp_avg_sq, const Chunk* __restrict__ chunks, const int* __restrict__ active,
    const Step* __restrict__ steps, const int* __restrict__ skip, double* __restrict__ partial
) {
    const Chunk chunk = chunks[blockIdx.x];
    if (*skip || !active[chunk.segment]) return;
    const Step step = steps[chunk.segment];
    const float* g = gradient + chunk.start;
    const float* p = master + chunk.start;
    float* m = exp_avg + chunk.start;
    float* v = exp_avg_sq + chunk.start;
    float p_squares = 0, u_squares = 0;
    const long long vectors = chunk.length / 4;
    for (long long i = threadIdx.x; i < vectors; i += blockDim.x) {
        const float4 g4 = ((const float4*)g)[i], p4 = ((const float4*)p)[i];
        float4 m4 = ((float4*)m)[i], v4 = ((float4*)v)[i];
        update_moments(step, g4.x, p4.x, m4.x, v4.x, p_squares, u_squares);
        update_moments(step, g4.y, p4.y, m4.y, v4.y, p_squares, u_squares);
        update_moments(step, g4.z, p4.z, m4.z, v4.z, p_squares, u_squares);
        update_moments(step, g4.w, p4.w, m4.w, v4.w, p_squares, u_squares);
        ((float4*)m)[i] = m4;
        ((float4*)v)[i] = v4;
    }
    for (long long i = vectors * 4 + threadIdx.x; i < chunk.length; i += blockDim.x) {
        update_moments(step, g[i], p[i], m[i], v[i], p_squares, u_squares);
    }
    const double p_sum = sum_over_block((double)p_squares), u_sum = sum_over_block((double)u_squares);
    if (threadIdx.x == 0) {
        partial[2 * (long long)blockIdx.x] = p_sum;
        partial[2 * (long long)blockIdx.x + 1] = u_sum;
    }
}

// One block a segment: norms[2 * segment] = sum of p^2, norms[2 * segment + 1] = sum of u^2; 0 where nothing is done.
// The chunks of a segment are first_chunk[segment] .. first_chunk[segment + 1] - 1; a segment may have none.
extern "C" __global__ void __launch_bounds__(128) lamb_norms(
    const double* __restrict__ partial, const long long* __restrict__ first_chunk, const int* __restrict__ active,
    const int* __restrict__ skip, double* __restrict__ norms
) {
    const long long segment = blockIdx.x;
    double p_squares = 0, u_squares = 0;
    if (!*skip && active[segment]) {
        for (long long i = first_chunk[segment] + threadIdx.x; i < first_chunk[segment + 1]; i += blockDim.x) {
            p_squares += partial[2 * i];
            u_squares += partial[2 * i + 1];
        }
    }
    p_squares = sum_over_block(p_squares);
    u_squares = sum_over_block(u_squares);
    if (threadIdx.x != 0) return;
    norms[2 * segment] = p_squares;
    norms[2 * segment + 1] = u_squares;
}

// p -= lr * |p| / |u| * u where the trust ratio applies and both norms are not zero, else p -= lr * u.
// `low_kind` of a segment: 0 no 16-bit copy, 1 bf16, 2 fp16.
extern "C" __global__ void __launch_bounds__(256) lamb_apply(
    const float* __restrict__ exp_avg, const float* __restrict__ exp_avg_sq, const Chunk* __restrict__ chunks,
    const int* __restrict__ active, const Step* __restrict__ steps, const double* __restrict__ norms,
    const Group* __restrict__ groups, const long long* __restrict__ segment_group, const int* __restrict__ low_kind,
    const int* __restrict__ skip, float* __restrict__ master, unsigned short* __restrict__ low
) {
    const Chunk chunk = chunks[blockIdx.x];
    if (*skip || !active[chunk.segment]) return;
    const Step step = steps[chunk.segment];
    __shared__ float factor_of_block;
    if (threadIdx.x == 0) {
        const Group& group = groups[segment_group[chunk.segment]];
        const double p_squares = norms[2 * chunk.segment], u_squares = norms[2 * chunk.segment + 1];
        const bool use_ratio = group.adaptive != 0 && p_squares > 0 && u_squares > 0;
        factor_of_block = (float)(use_ratio ? group.lr * sqrt(p_squares / u_squares) : group.lr);
    }
    __syncthreads();
    const float factor = factor_of_block;
    const int has_low = low_kind[chunk.segment], is_fp16 = has_low == 2;
    const float* m = exp_avg + chunk.start;
    const float* v = exp_avg_sq + chunk.start;
    float* p = master + chunk.start;
    unsigned short* copy = has_low ? low + chunk.start : nullptr;
    const long long vectors = chunk.length / 4;
#pragma unroll 2
    for (long long i = threadIdx.x; i < vectors; i += blockDim.x) {
        const float4 m4 = ((const float4*)m)[i], v4 = ((const float4*)v)[i];
        float4 p4 = ((float4*)p)[i];
        p4.x -= factor * compute_update(step, p4.x, m4.x, v4.x);
        p4.y -= factor * compute_update(step, p4.y, m4.y, v4.y);
        p4.z -= factor * compute_update(step, p4.z, m4.z, v4.z);
        p4.w -= factor * compute_update(step, p4.w, m4.w, v4.w);
        ((float4*)p)[i] = p4;
        if (has_low) {
            ushort4 copy4;
            copy4.x = round_to_16_bits(p4.x, is_fp16);
            copy4.y = round_to_16_bits(p4.y, is_fp16);
            copy4.z = round_to_16_bits(p4.z, is_fp16);
            copy4.w = round_to_16_bits(p4.w, is_fp16);
            ((ushort4*)copy)[i] = copy4;
        }
    }
    for (long long i = vectors * 4 + threadIdx.x; i < chunk.length; i += blockDim.x) {
        p[i] -= factor * compute_update(step, p[i], m[i], v[i]);
        if (has_low) copy[i] = round_to_16_bits(p[i], is_fp16);
    }
}
