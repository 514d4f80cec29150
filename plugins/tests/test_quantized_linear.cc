// QuantizedLinear against the same arithmetic written for reading. The matrix ends where its memory does: a kernel that
// reads further falls over. Skipped on a processor that has no kernels for it.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "cpu/quantized_linear.h"
#include "failures.h"
#include "judges.h"

namespace trimkv::test {
namespace {

// A copy of bytes right before a page that cannot be read, and aligned to nothing.
class Fenced {
 public:
  Fenced(const void* data, size_t bytes) : page_(sysconf(_SC_PAGESIZE)), size_((bytes / page_ + 2) * page_) {
    memory_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    char* const fence = memory_ + size_ - page_;
    data_ = fence - bytes;
    std::memcpy(data_, data, bytes);
    mprotect(fence, page_, PROT_NONE);
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  ~Fenced() { munmap(memory_, size_); }
  const char* data() const { return data_; }

 private:
  size_t page_, size_;
  char *memory_, *data_;
};

struct Format {
  int32_t bits, block_size, columns;
  bool zeros, half_scales;
};

// One matrix: as the kernel takes it, and its parts one by one.
class Matrix {
 public:
  Matrix(const Format& format, int64_t rows, std::mt19937& random) : format_(format), rows_(rows) {
    const int64_t blocks = format.columns / format.block_size, most = (1 << format.bits) - 1;
    std::uniform_int_distribution<int> number(0, static_cast<int>(most));
    std::uniform_real_distribution<float> scale(-0.02f, 0.02f);
    for (int64_t i = 0; i < rows * format.columns; ++i) numbers_.push_back(number(random));
    for (int64_t i = 0; i < rows * blocks; ++i) {
      const float found = scale(random);
      halves_.push_back(FromFloat<Half>(found).bits);
      scales_.push_back(format.half_scales ? ToFloat(Half{halves_.back()}) : found);
      zeros_.push_back(format.zeros ? number(random) : 1 << (format.bits - 1));
    }
    const std::vector<uint8_t> numbers = Packed(numbers_, format.columns), zeros = Packed(zeros_, blocks);
    fenced_numbers_ = std::make_unique<Fenced>(numbers.data(), numbers.size());
    fenced_zeros_ = std::make_unique<Fenced>(zeros.data(), zeros.size());
    fenced_scales_ = format.half_scales ? std::make_unique<Fenced>(halves_.data(), halves_.size() * 2)
                                        : std::make_unique<Fenced>(scales_.data(), scales_.size() * 4);
  }

  cpu::QuantizedMatrix View() const {
    const auto bytes = [](const Fenced& part) { return reinterpret_cast<const uint8_t*>(part.data()); };
    return {bytes(*fenced_numbers_),
            fenced_scales_->data(),
            format_.zeros ? bytes(*fenced_zeros_) : nullptr,
            format_.half_scales,
            rows_,
            format_.columns,
            format_.bits,
            format_.block_size};
  }
  int64_t rows() const { return rows_; }

  // x rounded block by block, times a row: sums of whole numbers, then of doubles.
  double Dot(const float* x, int64_t row) const {
    double sum = 0;
    for (int32_t at = 0; at < format_.columns; at += cpu::kInputBlock) {
      float top = 0;
      for (int i = 0; i < cpu::kInputBlock; ++i) top = std::max(top, std::fabs(x[at + i]));
      const float inverse = top > 0 ? 127.0f / top : 0;
      const int64_t block = row * (format_.columns / format_.block_size) + at / format_.block_size;
      int64_t whole = 0;
      for (int i = 0; i < cpu::kInputBlock; ++i) {
        const auto rounded = static_cast<int64_t>(std::nearbyint(x[at + i] * inverse));
        whole += rounded * (numbers_[row * format_.columns + at + i] - zeros_[block]);
      }
      sum += static_cast<double>(whole) * scales_[block] * (top / 127.0f);
    }
    return sum;
  }

 private:
  std::vector<uint8_t> Packed(const std::vector<int>& values, int64_t of_row) const {
    std::vector<uint8_t> out;
    for (size_t first = 0; first < values.size(); first += of_row) {
      for (int64_t i = 0; i < of_row; i += format_.bits == 4 ? 2 : 1) {
        const int high = format_.bits == 4 && i + 1 < of_row ? values[first + i + 1] << 4 : 0;
        out.push_back(static_cast<uint8_t>(values[first + i] | high));
      }
    }
    return out;
  }

  Format format_;
  int64_t rows_;
  std::vector<int> numbers_, zeros_;
  std::vector<float> scales_;
  std::vector<uint16_t> halves_;
  std::unique_ptr<Fenced> fenced_numbers_, fenced_scales_, fenced_zeros_;
};

std::vector<std::vector<float>> Run(const std::vector<Matrix>& matrices, const float* x, int64_t inputs,
                                    const cpu::Parallel& parallel) {
  cpu::QuantizedLinearArgs args{};
  args.matrices = static_cast<int>(matrices.size());
  args.x = x;
  args.inputs = inputs;
  std::vector<std::vector<float>> out;
  for (const Matrix& matrix : matrices) out.emplace_back(inputs * matrix.rows(), NAN);
  for (size_t m = 0; m < matrices.size(); ++m) args.matrix[m] = matrices[m].View(), args.y[m] = out[m].data();
  EXPECT(cpu::Check(args) == nullptr, "%s", cpu::Check(args));
  Garbage workspace(cpu::QuantizedLinearWorkspaceBytes(args));
  args.workspace = workspace.data();
  cpu::QuantizedLinear(args, parallel);
  return out;
}

void Products(const Format& format, std::mt19937& random) {
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  std::vector<Matrix> matrices;
  for (int count = pick(1, cpu::kMaxMatrices); count > 0; --count) matrices.emplace_back(format, pick(1, 70), random);
  const int64_t inputs = pick(1, 9);
  std::normal_distribution<float> normal;
  std::vector<float> x(inputs * format.columns);
  for (float& value : x) value = normal(random);
  std::fill_n(x.begin(), cpu::kInputBlock, 0.0f);  // a block of nothing
  static size_t threads = 3;
  const auto found = Run(matrices, x.data(), inputs, {RunThreads, &threads, 3});
  for (size_t m = 0; m < matrices.size(); ++m) {
    for (int64_t i = 0; i < inputs; ++i) {
      for (int64_t row = 0; row < matrices[m].rows(); ++row) {
        const double wanted = matrices[m].Dot(&x[i * format.columns], row);
        const float got = found[m][i * matrices[m].rows() + row];
        const double near = 1e-5 * (1 + std::fabs(wanted)) * (1 << format.bits) / 16;
        EXPECT(std::fabs(got - wanted) <= near, "%d bits, blocks of %d, %d columns%s%s: %g, expected %g", format.bits,
               format.block_size, format.columns, format.zeros ? ", zeros" : "", format.half_scales ? ", halves" : "",
               got, wanted);
      }
    }
  }
  // Alone, each input gives the same to the bit.
  for (int64_t i = 0; i < inputs; ++i) {
    const auto alone = Run(matrices, &x[i * format.columns], 1, cpu::Serial());
    for (size_t m = 0; m < matrices.size(); ++m) {
      EXPECT(std::memcmp(alone[m].data(), &found[m][i * matrices[m].rows()], alone[m].size() * sizeof(float)) == 0,
             "input %d differs alone", static_cast<int>(i));
    }
  }
}

void Refusals() {
  cpu::QuantizedLinearArgs args{};
  const auto with = [&](int64_t rows, int32_t columns, int32_t bits, int32_t block_size) {
    args.matrix[0] = {nullptr, nullptr, nullptr, false, rows, columns, bits, block_size};
    return cpu::Check(args) != nullptr;
  };
  EXPECT(with(4, 64, 4, 32), "no matrices");
  args.matrices = args.inputs = 1;
  EXPECT(!with(4, 64, 4, 32), "%s", cpu::Check(args));
  EXPECT(with(4, 64, 3, 32), "bits");
  EXPECT(with(4, 64, 4, 16) && with(4, 96, 4, 48), "block_size");
  EXPECT(with(4, 80, 4, 32) && with(4, 0, 4, 32), "columns");
  EXPECT(with(0, 64, 4, 32), "rows");
  args.matrices = 2;
  args.matrix[1] = {nullptr, nullptr, nullptr, true, 4, 64, 4, 32};
  EXPECT(with(4, 64, 4, 32), "formats");
}

}  // namespace
}  // namespace trimkv::test

int main() {
  using namespace trimkv::test;
  Refusals();
  if (trimkv::cpu::GetQuantizedKernels() == nullptr) {
    std::puts("skipped: this processor does not have the instruction set");
    return 77;
  }
  std::mt19937 random(0);
  for (int32_t bits : {4, 8}) {
    for (int32_t block_size : {32, 64, 128, 256}) {
      for (int32_t blocks : {1, 2, 3, 5, 9, 24}) {
        for (int flags = 0; flags < 4; ++flags) {
          Products({bits, block_size, block_size * blocks, (flags & 1) != 0, (flags & 2) != 0}, random);
        }
      }
    }
  }
  std::printf(g_failures ? "%d failures\n" : "all passed\n", g_failures);
  return g_failures != 0;
}
