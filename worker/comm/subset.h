// Some ranks of a group as a group of their own, e.g. those that share the experts of a layer, and
// those that hold the same experts (training-runtime.md 10). No connection of its own: everything
// goes through StartAllToAll of the whole group, with nothing for the others, so that there is one
// order of collectives, one record of them and one deadline.
#pragma once

#include <memory>
#include <vector>

#include "worker/comm/communicator.h"

namespace heddle::comm {

// `members` are ranks of `whole`, ascending, this one among them; rank() is the place in it, and
// errors name ranks by their numbers in `whole`. Every rank of `whole` has a subset, all subsets
// have as many members, and all ranks call the same operation at the same time, each on its own
// subset: sums on as many elements, gathers and exchanges of any size. Sums have the bits of a
// group of the members alone. Units go to `whole`, which records every operation as the all-to-alls
// that it is made of.
//
// SetTimeout and Abort are those of `whole`, which is borrowed and may be used in between, in the
// same order on all ranks. Same thread.
std::unique_ptr<Communicator> MakeSubset(Communicator* whole, std::vector<int> members);

}  // namespace heddle::comm
