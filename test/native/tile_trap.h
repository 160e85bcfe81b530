// AMX for a processor without it: each of its instructions is an invalid one there, and the handler of that signal does
// what Intel's manual says it does. So code for the processor's own tiles runs, encoded as it is, wherever Linux runs on
// x86-64. Where the processor has AMX, nothing is ever trapped.
#pragma once

#include <signal.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace tile_trap {

struct Tile {
  uint32_t word[16][16];
};

/// Of the thread: like the processor's, off until they are configured.
struct State {
  bool isOn = false;
  Tile tile[8];
};
inline thread_local State state;
inline thread_local int64_t trapped = 0;

[[noreturn]] inline void refuse(const char* why) {
  std::fprintf(stderr, "tiles: %s\n", why);
  std::_Exit(1);
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
/// Half 0 or 1 of a pair of bf16.
inline float half(uint32_t pair, int which) {
  return flushed(std::bit_cast<float>(which ? pair & 0xffff0000u : pair << 16));
}

/// tdpbf16ps
inline void multiplyAdd(Tile& c, const Tile& a, const Tile& b) {
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 16; ++n) {
      float sum[2] = {0, 0};
      for (int i = 0; i < 2; ++i) {
        for (int k = 0; k < 16; ++k) {
          sum[i] = flushed(std::fma(half(a.word[m][k], i), half(b.word[k][n], i), sum[i]));
        }
      }
      const float before = flushed(std::bit_cast<float>(c.word[m][n]));
      c.word[m][n] = std::bit_cast<uint32_t>(flushed(before + flushed(sum[0] + sum[1])));
    }
  }
}

/// One instruction with a three-byte VEX prefix, whose operands are read as the processor reads them.
class Instruction {
 public:
  Instruction(const uint8_t* code, greg_t* registers) : code_(code), registers_(registers) {
    if (code[0] != 0xc4 || (code[1] & 31) != 2) refuse("an invalid instruction that is none of tiles");
  }

  /// The address of the next instruction.
  const uint8_t* run() {
    const int prefix = code_[2] & 3, opcode = code_[3], modrm = code_[4];
    const int reg = modrm >> 3 & 7, rm = modrm & 7;
    const bool isMemory = modrm >> 6 != 3;
    if (opcode == 0x49 && prefix == 0 && isMemory && reg == 0) {
      configure(address());
    } else if (opcode == 0x49 && prefix == 0 && modrm == 0xc0) {
      state.isOn = false;
    } else {
      if (!state.isOn) refuse("used before they were configured");
      if (opcode == 0x49 && prefix == 3 && !isMemory) {
        std::memset(&state.tile[reg], 0, sizeof(Tile));
      } else if (opcode == 0x4b && (prefix == 3 || prefix == 2) && isMemory) {
        char* row = const_cast<char*>(address());
        for (auto& words : state.tile[reg].word) {
          prefix == 3 ? std::memcpy(words, row, 64) : std::memcpy(row, words, 64);
          row += stride_;
        }
      } else if (opcode == 0x5c && prefix == 2 && !isMemory) {
        const int second = ~code_[2] >> 3 & 15;
        if (reg == rm || reg == second || rm == second) refuse("a product of a tile with itself");
        multiplyAdd(state.tile[reg], state.tile[rm], state.tile[second]);
      } else {
        refuse("an instruction that the test does not know");
      }
    }
    return code_ + length_;
  }

 private:
  int64_t value(int number) const {
    static constexpr int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                       REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return registers_[kOrder[number]];
  }

  const char* address() {
    const int mode = code_[4] >> 6, rm = code_[4] & 7;
    const int x = ~code_[1] >> 6 & 1, b = ~code_[1] >> 5 & 1;
    int64_t at = 0;
    if (rm == 4) {
      const int sib = code_[5], index = (sib >> 3 & 7) + 8 * x;
      if (mode == 0 && (sib & 7) == 5) refuse("an address without a base");
      at = value((sib & 7) + 8 * b);
      stride_ = index == 4 ? 0 : value(index) << (sib >> 6);
      length_ = 6;
    } else {
      if (mode == 0 && rm == 5) refuse("an address beside the code");
      at = value(rm + 8 * b);
    }
    if (mode == 1) {
      at += static_cast<int8_t>(code_[length_]);
      length_ += 1;
    } else if (mode == 2) {
      int32_t offset;
      std::memcpy(&offset, code_ + length_, 4);
      at += offset;
      length_ += 4;
    }
    return reinterpret_cast<const char*>(at);
  }

  static void configure(const char* from) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(from);
    bool isFull = bytes[0] == 1;
    for (int i = 1; i < 16; ++i) isFull &= bytes[i] == 0;
    for (int t = 0; t < 16; ++t) {
      uint16_t rowBytes;
      std::memcpy(&rowBytes, bytes + 16 + 2 * t, 2);
      isFull &= rowBytes == (t < 8 ? 64 : 0) && bytes[48 + t] == (t < 8 ? 16 : 0);
    }
    if (!isFull) refuse("configured in another way than eight full ones");
    state = {};
    state.isOn = true;
  }

  const uint8_t* code_;
  greg_t* registers_;
  int length_ = 5;
  int64_t stride_ = 0;
};

inline void install() {
  struct sigaction action {};
  action.sa_flags = SA_SIGINFO;
  action.sa_sigaction = [](int, siginfo_t*, void* context) {
    greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    Instruction instruction(reinterpret_cast<const uint8_t*>(registers[REG_RIP]), registers);
    registers[REG_RIP] = reinterpret_cast<greg_t>(instruction.run());
    ++trapped;
  };
  sigaction(SIGILL, &action, nullptr);
}

}  // namespace tile_trap
