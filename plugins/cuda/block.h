// What kernel bodies may ask of the machine. The bodies are templates on this class: nvcc compiles them with
// DeviceBlock, and the host tests (plugins/tests/cuda/emulated_block.h) run the same lines on emulated threads.
#pragma once

#include <cstdint>

#include "trimkv/scalar.h"

#if defined(__CUDACC__)
#define TRIMKV_DEVICE __device__ __forceinline__
#define TRIMKV_UNROLL _Pragma("unroll")
#else
#define TRIMKV_DEVICE inline
#define TRIMKV_UNROLL
#endif

namespace trimkv::cuda {

inline constexpr int kWarpSize = 32;

// Exclusive upper bounds and counts are int32 throughout; byte and element offsets into tensors are int64.
template <class T>
TRIMKV_HOST_DEVICE constexpr T CeilDiv(T value, T by) {
  return (value + by - 1) / by;
}

TRIMKV_DEVICE int32_t Clamp(int32_t value, int32_t low, int32_t high) {
  return value < low ? low : value > high ? high : value;
}

#if defined(__CUDACC__)

class DeviceBlock {
 public:
  __device__ int Thread() const { return static_cast<int>(threadIdx.x); }
  __device__ int Threads() const { return static_cast<int>(blockDim.x); }
  __device__ int Lane() const { return Thread() % kWarpSize; }
  __device__ int Warp() const { return Thread() / kWarpSize; }
  __device__ int Warps() const { return Threads() / kWarpSize; }

  __device__ void Sync() const { __syncthreads(); }
  __device__ void SyncWarp() const { __syncwarp(); }

  // Collectives of a whole warp: every lane must take part.
  template <class T>
  __device__ T Shuffle(T value, int lane) const {
    return __shfl_sync(~0u, value, lane);
  }
  template <class T>
  __device__ T ShuffleXor(T value, int mask) const {
    return __shfl_xor_sync(~0u, value, mask);
  }
  template <class T>
  __device__ T ShuffleUp(T value, int by) const {  // own value in the lowest `by` lanes
    return __shfl_up_sync(~0u, value, by);
  }
  __device__ uint32_t Ballot(bool vote) const { return __ballot_sync(~0u, vote); }
  __device__ uint32_t MatchAny(int32_t value) const { return __match_any_sync(~0u, value); }

  __device__ int PopCount(uint32_t bits) const { return __popc(bits); }
  __device__ void AtomicAdd(int32_t* at, int32_t by) const { atomicAdd(at, by); }
  __device__ float Exp2(float x) const { return exp2f(x); }

  // 16 bytes from global to shared memory, zeros if not valid; `from` must be readable either way.
  __device__ void CopyAsync(void* to, const void* from, bool valid) const {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(__cvta_generic_to_global(from)),
                 "r"(valid ? 16 : 0)
                 : "memory");
  }
  __device__ void CommitCopies() const { asm volatile("cp.async.commit_group;" ::: "memory"); }
  template <int kPending>  // all but the newest kPending groups of this thread have arrived
  __device__ void WaitCopies() const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
  }

  // Four 8 x 8 matrices of 16-bit elements; lane i passes the address of row i % 8 of matrix i / 8 (16 bytes). Lane i
  // gets elements (i / 4, 2 (i % 4) + {0, 1}) of each matrix; transposed: elements (2 (i % 4) + {0, 1}, i / 4).
  __device__ void LoadMatrices(uint32_t (&out)[4], const void* row) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
  }
  __device__ void LoadMatricesTransposed(uint32_t (&out)[4], const void* row) const {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
                 : "memory");
  }

  // sum [16, 8] += a [16, 16] · b [16, 8]. With g = lane / 4 and j = 2 (lane % 4), low element first:
  //   a: (g, j), (g + 8, j), (g, j + 8), (g + 8, j + 8), each with the next column
  //   b: (j, g), (j + 8, g), each with the next row        sum: (g, j), (g, j + 1), (g + 8, j), (g + 8, j + 1)
  __device__ void Multiply(Half, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  __device__ void Multiply(BFloat16, float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) const {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

#endif  // __CUDACC__

}  // namespace trimkv::cuda
