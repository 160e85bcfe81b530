// Work over many tensors at once (all parameters, all gradients): one launch, a block a piece. Where the pieces lie is
// a table that is sent to the device before.
#pragma once

#include "core/page_file.h"
#include "cuda/device.h"

namespace qlora {

// A multiple of every block size of block-quantized optimizer state.
constexpr int64_t kPiece = 32768;

/// `count` elements from somewhere in a tensor on, and where they begin in each of `arrays` parallel arrays.
template <int arrays>
struct Place {
  char* at[arrays];
  int64_t count;
};

template <int arrays>
struct Places {
  const Place<arrays>* data;  // on the device
  int64_t count;
};

template <int arrays>
Places<arrays> sendPlaces(Context& context, const std::vector<Place<arrays>>& places) {
  const int64_t count = static_cast<int64_t>(places.size());
  Place<arrays>* data = context.scratch.take<Place<arrays>>(count);
  if (context.queue && count) context.queue->write(data, places.data(), places.size() * sizeof(Place<arrays>));
  return {data, count};
}

/// Of all elements of the tensors of lists[0], beside which the others lie.
template <int arrays>
Places<arrays> placesOf(Context& context, const PagedArray (&lists)[arrays]) {
  std::vector<Place<arrays>> places;
  const std::vector<Tensor>& tensors = *lists[0].list;
  for (size_t t = 0; t < tensors.size(); ++t) {
    const int64_t size = tensors[t].size();
    for (int64_t begin = 0; begin < size; begin += kPiece) {
      Place<arrays> place{{}, std::min(kPiece, size - begin)};
      for (int k = 0; k < arrays; ++k) {
        place.at[k] = (*lists[k].list)[t].template data<char>() + begin / lists[k].elements * lists[k].itemBytes;
      }
      places.push_back(place);
    }
  }
  return sendPlaces(context, places);
}

}  // namespace qlora
