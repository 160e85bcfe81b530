// The blocked matmul, over an engine that knows one tile of registers.
//
// A tile holds kRows x kStrip sums. One operand of it is broadcast, an element (or a pair of bf16) at a time: its panel
// is [row][k], kStride apart. The other lies in lanes: its panel is a strip of kStrip columns, [k][lane] ([k /
// 2][lane][2] for pairs). A lanes panel has its columns in split order (rows.h): kVector evens, then kVector odds.
//
//   nt       lanes are rows of A, packed once for all tasks; rows of B are decoded by each task and broadcast. K is in
//            split order on both sides. The tile is transposed when it is stored.
//   nn, tn   rows (columns) of A are packed once and broadcast; rows of B are decoded by each task into lanes. No
//            transposition, except that tn swaps the operands where that makes the broadcast side the smaller one.
//
// An engine also says: kDepth, to whole ones of which K is padded with zeros on both sides; kRowUnit, see below;
// kDecoded, the largest block that a task decodes; and what a thread holds while it multiplies (Session). One whose
// tiles of kPieceRows rows leave registers for it decodes 4-bit weights between the steps of a product (pieces_bf16.h).
//
// A task owns a block of C and walks all of K, so a sum is always made in the same order.
#pragma once

#include "simd/gemm_block.h"
#include "simd/lines_ahead.h"
#include "simd/rows.h"

namespace qlora::QLORA_ISA {

/// Steps of K of one tile: its rows, kStride apart, and its strip.
template <class Element>
struct Steps {
  const Element *rows, *strip;
  int64_t depth;
};

template <class E>
class Engine {
 public:
  using Element = typename E::Element;
  static constexpr int kRows = E::kRows, kStrip = 2 * kVector, kDepth = E::kDepth;
  static constexpr int kChunk = E::kChunk, kStride = E::kStride;
  using Block = GemmBlock<E>;
  static constexpr bool kHasPieces = requires { E::kPieceRows; };
  // Tiles take whole units of rows: so many more than there are may be read, and are multiplied for nothing.
  static constexpr int64_t kRowsBeyond = E::kRowUnit - 1;

  static PackedA pack(Context& context, GemmForm form, DType compute, const GemmOperand& a, int64_t M, int64_t K,
                      bool split) {
    PackedA packed{form, compute, M, K, nullptr, split};
    if (form == GemmForm::nt) {
      const int64_t depth = splitDepth<E>(K), strips = ceilDivide(M, kStrip), chunks = ceilDivide(K, kChunk);
      auto* panels = context.scratch.take<Element>(strips * depth * kStrip + 1);
      context.pool.parallelFor(strips * chunks, [&](int64_t task, int) {
        const int64_t strip = task / chunks, begin = task % chunks * kChunk, end = std::min<int64_t>(begin + kChunk, K);
        const int64_t lanes = std::min<int64_t>(kStrip, M - strip * kStrip);
        Element* out = panels + stripOffset(strips, strip, begin, depth);
        // Rows of a piece stay in the first cache until they are transposed.
        constexpr int64_t kPiece = 128, kApart = kPiece + 32;
        alignas(64) Element rows[kStrip * kApart];
        std::fill(rows + lanes * kApart, rows + kStrip * kApart, Element{});
        for (int64_t k = begin; k < end; k += kPiece) {
          const int64_t n = std::min(kPiece, end - k);
          if (split) {
            E::rowsSplit(a, compute, strip * kStrip, lanes, k, n, rows, kApart);
          } else {
            E::rowsNatural(a, compute, strip * kStrip, lanes, k, n, rows, kApart);
            zeroTails(rows, lanes, kApart, n, splitDepth<E>(n));
          }
          E::lanesFromRows(rows, kApart, splitDepth<E>(n), out + (k - begin) * kStrip);
        }
      });
      packed.panels = panels;
      return packed;
    }
    const int64_t chunks = ceilDivide(K, kChunk), blocks = ceilDivide(M, kRowsPacked);
    Element* panels = rowPanels(context, M, K);
    context.pool.parallelFor(chunks * blocks, [&](int64_t task, int) {
      const int64_t chunk = task % chunks, k = chunk * kChunk, n = std::min<int64_t>(kChunk, K - k);
      const int64_t row = task / chunks * kRowsPacked, rows = std::min(kRowsPacked, M - row);
      Element* out = panels + (chunk * M + row) * kStride;
      if (form == GemmForm::nn) {
        E::rowsNatural(a, compute, row, rows, k, n, out, kStride);
      } else {
        Element line[kRowsPacked];
        for (int64_t c = 0; c < n; ++c) {
          readNatural(a, compute, k + c, row, rows, line);
          for (int64_t r = 0; r < rows; ++r) out[r * kStride + c] = line[r];
        }
      }
      zeroTails(out, rows, kStride, n, roundUp(n, kDepth));
    });
    packed.panels = panels;
    return packed;
  }

  /// Room for M rows of K that are packed for nn: [chunk][row][k].
  static Element* rowPanels(Context& context, int64_t M, int64_t K) {
    return context.scratch.take<Element>((ceilDivide(K, kChunk) * M + kRowsBeyond) * kStride + 1);
  }

  static void run(Context& context, const Gemm& g) {
    if (g.form == GemmForm::tn && g.M > g.N) {
      Gemm swapped = g;
      std::swap(swapped.M, swapped.N);
      std::swap(swapped.a, swapped.b);
      return Engine(context, swapped, Store::transposed).runTasks(context);
    }
    Engine(context, g, g.form == GemmForm::nt ? Store::transposed : Store::direct).runTasks(context);
  }

 private:
  static void zeroTails(Element* rows, int64_t count, int64_t stride, int64_t from, int64_t to) {
    for (int64_t r = 0; r < count; ++r) std::fill(rows + r * stride + from, rows + r * stride + to, Element{});
  }

  /// Packed lanes lie chunk by chunk, so that those of one chunk are neighbours: at steps of a whole K, often a power
  /// of two, they would fall into the same sets of the caches.
  static int64_t chunkDepth(int64_t k, int64_t depth) { return std::min<int64_t>(kChunk, depth - k); }
  static int64_t stripOffset(int64_t strips, int64_t strip, int64_t k, int64_t depth) {
    return (k * strips + strip * chunkDepth(k, depth)) * kStrip;
  }

  enum class Store { direct, transposed };
  static constexpr int64_t kRowsPacked = 64;
  // Blocks of the operand that each task decodes, and of the one that is packed once: what fits the second cache.
  static constexpr int64_t kDecoded = E::kDecoded, kShared = 512;

  struct Term {
    GemmOperand b;
    int64_t K;
    const Element* a;
    DropoutMask dropout;
    bool split;
    int64_t strips;  // of which the panels are, perhaps more than are multiplied
  };

  Engine(Context& context, const Gemm& g, Store store) : g_(g), store_(store), lanesShared_(g.form == GemmForm::nt) {
    if (g.extra.K > 0) {
      const PackedA packed = pack(context, g.form, g.compute, g.extra.a, g.M, g.extra.K, hasSplitOrder(g.extra.b));
      addTerm(g.extra.b, g.extra.K, packed, g.extra.dropout);
    }
    if (g.K > 0) {
      const PackedA packed = g.packed ? *g.packed : pack(context, g.form, g.compute, g.a, g.M, g.K, hasSplitOrder(g.b));
      addTerm(g.b, g.K, packed, {});
    }
    // A thread has rows of its own where they are many: it wrote them in the operation before, and reading or writing
    // what another core wrote last costs more than decoding once more. Then enough tasks that no thread idles at the
    // end.
    constexpr int64_t kTasks = 4, kOwnRows = 128;
    if constexpr (kHasPieces) {
      inPieces_ = g.K > 0 && E::hasPieces(g.b);
      if (inPieces_) groupRows_ = E::kPieceRows;
      rides_ = inPieces_ && g.extra.K > 0 && g.extra.K <= kChunk && !(g.extra.dropout.p > 0);
    }
    const int64_t sharedUnit = lanesShared_ ? kStrip : kRows, decodedUnit = lanesShared_ ? kStrip : E::kLanesUnit;
    const int threads = context.pool.size();
    const int64_t own = std::clamp<int64_t>(g.M / kOwnRows, 1, threads);
    shared_ = even(g.M, std::min(kShared, ceilDivide(g.M, own)), sharedUnit);
    decoded_ = even(g.N, kDecoded, decodedUnit);
    while (tasks() < kTasks * threads && decoded_ > std::max<int64_t>(32, decodedUnit))
      decoded_ = even(g.N, decoded_ / 2, decodedUnit);
    while (tasks() < kTasks * threads && shared_ > 64) shared_ = even(g.M, shared_ / 2, sharedUnit);
    const int64_t rows = lanesShared_ ? decoded_ : shared_, lanes = lanesShared_ ? shared_ : decoded_;
    panelSize_ = lanesShared_ ? decoded_ * kStride : roundUp(decoded_, decodedUnit) * kChunk;
    tilesSize_ = (rows / groupRows_ + 1) * ceilDivide(lanes, kStrip) * Block::kTile;
    panelBuffer_ = context.scratch.take<Element>(threads * panels() * panelSize_);
    tilesBuffer_ = context.scratch.take<float>(threads * tilesSize_);
  }

  void addTerm(const GemmOperand& b, int64_t K, const PackedA& a, const DropoutMask& dropout) {
    terms_[termCount_++] = {b, K, static_cast<const Element*>(a.panels), dropout, a.split, ceilDivide(a.M, kStrip)};
  }

  /// The size of the even blocks that n falls into when none may pass `limit`.
  static int64_t even(int64_t n, int64_t limit, int64_t unit) {
    const int64_t blocks = std::max<int64_t>(1, ceilDivide(n, std::max(limit, unit)));
    return std::max(unit, roundUp(ceilDivide(n, blocks), unit));
  }

  /// In pieces: two that take turns, and one of the extra product.
  int64_t panels() const { return inPieces_ ? 3 : 1; }
  int64_t tasks() const { return ceilDivide(g_.M, shared_) * ceilDivide(g_.N, decoded_); }

  void runTasks(Context& context) const {
    const int64_t columns = ceilDivide(g_.N, decoded_);
    context.pool.parallelFor(tasks(), [&](int64_t task, int thread) {
      runTask(task / columns * shared_, task % columns * decoded_, thread);
    });
  }

  /// Rows [m, m + shared_) by columns [n, n + decoded_) of C.
  void runTask(int64_t m, int64_t n, int thread) const {
    [[maybe_unused]] const typename E::Session session;
    Element* panel = panelBuffer_ + thread * panels() * panelSize_;
    const int64_t ms = std::min(shared_, g_.M - m), ns = std::min(decoded_, g_.N - n);
    Block block{lanesShared_ ? ns : ms, lanesShared_ ? ms : ns, groupRows_, tilesBuffer_ + thread * tilesSize_};
    bool first = true;
    for (int i = rides_ ? 1 : 0; i < termCount_; ++i) {
      const Term& term = terms_[i];
      if constexpr (kHasPieces) {
        if (inPieces_ && E::hasPieces(term.b)) {
          Operands also{};
          if (rides_) also = decoded(block, terms_[0], m, n, 0, panel + 2 * panelSize_);
          const auto multiplyWith = [&](auto&& pieces) {
            multiplyInPieces(block, term, m, n, panel, first, also, pieces);
          };
          lanesShared_ ? E::withRowPieces(term.b, multiplyWith) : E::withLanePieces(term.b, multiplyWith);
          first = false;
          continue;
        }
      }
      for (int64_t k = 0; k < term.K; k += kChunk) {
        multiply(block, decoded(block, term, m, n, k, panel), first, ahead(term, n, k + kChunk));
        first = false;
      }
      if (term.dropout.p > 0) block.applyDropout(term.dropout, g_.N, m, n);
    }
    if (first) std::fill_n(block.tiles, tilesSize_, 0.0f);
    if (store_ == Store::direct) {
      block.storeDirect(g_, m, n);
    } else if (lanesShared_) {
      block.storeTransposed(g_, m, n, LaneOrder::natural);
    } else {
      block.storeTransposed(g_, n, m, LaneOrder::split);
    }
  }

  /// What a block is multiplied from in one chunk of K: rows kStride apart, strips stripSize apart.
  struct Operands {
    const Element* rows;
    const Element* strips;
    int64_t stripSize, depth;

    Steps<Element> at(int64_t row, int64_t strip) const {
      if (depth == 0) return {};
      return {rows + row * kStride, strips + strip * stripSize, depth};
    }
  };

  /// Those of the chunk of a term from k on, whose B is decoded into the panel.
  Operands decoded(const Block& block, const Term& term, int64_t m, int64_t n, int64_t k, Element* panel) const {
    const int64_t size = std::min<int64_t>(kChunk, term.K - k);
    if (!lanesShared_) {
      E::lanes(term.b, g_.compute, k, size, n, block.lanes, panel);
      return withPacked(term, m, k, panel, roundUp(size, kDepth));
    }
    const int64_t padded = term.split ? splitDepth<E>(size) : roundUp(size, kDepth);
    if (term.split) {
      E::rowsSplit(term.b, g_.compute, n, block.rows, k, size, panel, kStride);
    } else {
      E::rowsNatural(term.b, g_.compute, n, block.rows, k, size, panel, kStride);
      zeroTails(panel, block.rows, kStride, size, padded);
    }
    return withPacked(term, m, k, panel, padded);
  }

  /// A decoded panel with the packed operand beside it.
  Operands withPacked(const Term& term, int64_t m, int64_t k, const Element* panel, int64_t depth) const {
    if (!lanesShared_) return {term.a + (k / kChunk * g_.M + m) * kStride, panel, int64_t{kChunk} * kStrip, depth};
    const int64_t whole = splitDepth<E>(term.K);
    return {panel, term.a + stripOffset(term.strips, m / kStrip, k, whole), chunkDepth(k, whole) * kStrip, depth};
  }

  /// The product of a term, whose next chunk is decoded while one is multiplied; `also` comes before the first.
  template <class Pieces>
  void multiplyInPieces(const Block& block, const Term& term, int64_t m, int64_t n, Element* panels, bool first,
                        Operands also, Pieces& pieces) const {
    const auto sizeAt = [&](int64_t k) { return std::min<int64_t>(kChunk, term.K - k); };
    const auto panelAt = [&](int64_t k) { return panels + k / kChunk % 2 * panelSize_; };
    const auto start = [&](int64_t k, int64_t ticks) {
      if (lanesShared_) {
        pieces.start(n, block.rows, k, sizeAt(k), panelAt(k), ticks);
      } else {
        pieces.start(k, sizeAt(k), n, block.lanes, panelAt(k), ticks);
      }
    };
    start(0, 1);
    pieces.finish();
    for (int64_t k = 0; k < term.K; k += kChunk) {
      const int64_t depth = lanesShared_ ? splitDepth<E>(sizeAt(k)) : roundUp(sizeAt(k), kDepth);
      const Operands all = withPacked(term, m, k, panelAt(k), depth);
      if (k + kChunk < term.K) start(k + kChunk, block.groups() * block.strips() * (also.depth + all.depth) / 2);
      block.forEachTile([&](int64_t row, int count, int64_t strip, float* tile) {
        E::tile(count, also.at(row, strip), all.at(row, strip), tile, first, pieces);
      });
      pieces.finish();
      first = false;
      also.depth = 0;
    }
  }

  /// The rows of the same B that are decoded after those of the chunk of K before `k`: the task's next, or the first of
  /// the task to its right.
  LinesAhead ahead(const Term& term, int64_t n, int64_t k) const {
    if (k >= term.K) {
      k = 0;
      n += decoded_;
    }
    if (n >= g_.N) return {};
    const int64_t size = std::min<int64_t>(kChunk, term.K - k), columns = std::min(decoded_, g_.N - n);
    return lanesShared_ ? LinesAhead(term.b, n, columns, k, size) : LinesAhead(term.b, k, size, n, columns);
  }

  // Not inline: the tiles' loops within would come twice.
  __attribute__((noinline)) void multiply(const Block& block, const Operands& all, bool first, LinesAhead ahead) const {
    const int64_t lines = ceilDivide(ahead.lines(), block.groups() * block.strips());
    block.forEachTile([&](int64_t row, int count, int64_t strip, float* tile) {
      ahead.ask(lines);
      // Decoded lanes are dealt over the whole strip, however few there are.
      const int64_t lanes = lanesShared_ ? std::min<int64_t>(kStrip, block.lanes - strip * kStrip) : kStrip;
      E::tile(count, static_cast<int>(lanes), all.depth, all.rows + row * kStride, all.strips + strip * all.stripSize,
              tile, first);
    });
  }

  const Gemm g_;
  const Store store_;
  const bool lanesShared_;
  Term terms_[2];
  int termCount_ = 0;
  int64_t shared_ = 0, decoded_ = 0;  // block sizes along M and N
  bool inPieces_ = false;             // see multiplyInPieces
  bool rides_ = false;                // whether the extra product is made in the same registers, not in a round before
  int groupRows_ = kRows;
  int64_t panelSize_ = 0, tilesSize_ = 0;
  Element* panelBuffer_ = nullptr;
  float* tilesBuffer_ = nullptr;
};

}  // namespace qlora::QLORA_ISA
