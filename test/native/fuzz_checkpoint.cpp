// libFuzzer on the way of a 4-bit or 8-bit weight from a file of strangers to the kernels: the file is opened and its
// header parsed, tensors are read into memory of the sizes that it claims, and what a description in the file says of
// them reaches dequantize and matmul only through their checks. An input is a safetensors file with tensors named
//   w  the weight   a  absmax   c  code   n  nested absmax   m  nested code   s  I64 [3]: N, K, block size
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <thread>
#include <utility>

#include "core/file.h"
#include "core/operation.h"
#include "core/safetensors.h"
#include "ops/op_table.h"
#include "testing.h"

using namespace qlora;

namespace {

/// A file that lives in memory.
class MemoryFile {
 public:
  MemoryFile(const uint8_t* data, size_t size) : descriptor_(memfd_create("fuzz", 0)) {
    CHECK(descriptor_ >= 0 && write(descriptor_, data, size) == static_cast<ssize_t>(size));
  }
  ~MemoryFile() { close(descriptor_); }
  std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

 private:
  int descriptor_;
};

const DType* dtypeOf(std::string_view name) {
  static const std::pair<std::string_view, DType> known[] = {
      {"F32", DType::f32}, {"BF16", DType::bf16}, {"F16", DType::f16}, {"U8", DType::u8}, {"I8", DType::i8}};
  for (const auto& [spelled, dtype] : known) {
    if (name == spelled) return &dtype;
  }
  return nullptr;
}

/// What the checks let pass is run, where a side without elements does not make the other one endless.
void runWeight(const Weight& weight, const std::shared_ptr<Memory>& memory, Stream& stream) {
  weight.check("fuzz");
  if (weight.N > 4096 || weight.K > 4096) return;
  const OpTable& ops = stream.ops();
  const Tensor y = makeTensor(memory, DType::bf16, {weight.N, weight.K});
  enqueue(stream, Dequantize{weight, y}, ops.dequantize, "dequantize");
  const Tensor x = makeTensor(memory, DType::bf16, {3, weight.K}),
               product = makeTensor(memory, DType::bf16, {3, weight.N});
  enqueue(stream, Fill{x, 1}, ops.fill, "fill");
  enqueue(stream, MatmulForward{x, weight, {}, product}, ops.matmulForward, "matmulForward");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto memory = std::make_shared<Memory>(Backing::pages);
  static Stream& stream = *new Stream(memory, cpuTable());
  try {
    const MemoryFile held(data, size);
    const InputFile file(held.path());
    unsigned char prefix[8] = {};
    file.read(prefix, std::min<uint64_t>(8, file.size()), 0);
    const uint32_t length = safetensorsHeaderLength(prefix, file.size());
    std::unique_ptr<char[]> text(new char[length]);
    file.read(text.get(), length, 8);
    const uint64_t dataStart = 8 + uint64_t{length};
    const SafetensorsHeader header(std::move(text), length, file.size() - dataStart);

    Weight weight{};
    for (const SafetensorsHeader::Entry& entry : header.entries()) {
      const std::string_view name = header.view(entry.name);
      const uint64_t bytes = entry.end - entry.begin;
      if (name == "s" && bytes == 24) {
        int64_t sizes[3];
        file.read(sizes, 24, dataStart + entry.begin);
        weight.N = sizes[0];
        weight.K = sizes[1];
        weight.blockSize = sizes[2];
        continue;
      }
      const DType* dtype = dtypeOf(kSafetensorsDTypes[entry.dtype].name);
      const std::vector<uint64_t> shape = header.shape(entry);
      if (!dtype || shape.size() > kMaxRank) continue;
      Tensor t;
      t.dtype = *dtype;
      t.rank = static_cast<int>(shape.size());
      for (size_t i = 0; i < shape.size(); ++i) t.shape[i] = static_cast<int64_t>(shape[i]);
      t.storage = std::make_shared<Storage>(memory, bytes, MemoryClass::weights);
      t.storage->allocate();
      readFiniteParallel(file, t.storage->data, bytes, dataStart + entry.begin, *dtype, threadPool());
      const std::pair<std::string_view, Tensor*> roles[] = {{"w", &weight.data},
                                                            {"a", &weight.absmax},
                                                            {"c", &weight.code},
                                                            {"n", &weight.nestedAbsmax},
                                                            {"m", &weight.nestedCode}};
      for (const auto& [role, tensor] : roles) {
        if (name == role) *tensor = t;
      }
    }
    if (weight.data.defined()) runWeight(weight, memory, stream);
  } catch (const Error& error) {
    CHECK(error.code.starts_with("ERR_QLORA_"));
  }
  std::atomic<bool> done{false};
  stream.post([&](Context&) { done = true; });
  while (!done) std::this_thread::yield();
  return 0;
}
