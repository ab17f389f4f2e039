"""Bugs for csrc/window_attention: (what is wrong, text of the source, text in its place)."""

IN_SCHEDULE = [
    ("segment cut at neither end", "begin = first < 0 ? 0 : first > last ? last : first;", "begin = first;"),
    ("end of a segment beyond the tensor", "after < begin ? begin : after > last ? last : after;", "after;"),
    (
        "longer prefix than the segment",
        "return length < num_prefix_tokens ? length :",
        "return false ? length :",
    ),
    (
        "slots without the segment",
        "__ldg(cu_seqlens + segment) / rows + segment;",
        "__ldg(cu_seqlens + segment) / rows;",
    ),
    ("search one segment too far", "low += (count - 1) * step;", "low += count * step;"),
    ("search without its upper end", "high = low + step < high ? low + step : high;", "high = low + 1;"),
    (
        "tile counted from the first slot of all",
        "slot - first_slot(p.cu_seqlens_q, kQueryRows, segment) :",
        "slot :",
    ),
    (
        "keys of the queries' segment",
        "const Segment keys(p.cu_seqlens_k,",
        "const Segment keys(p.cu_seqlens_q,",
    ),
    ("tiles that start at the prefix", "queries.begin + prefix_queries + tile", "queries.begin + tile"),
    ("prefix queries in every tile", "tile == 0 ? prefix_queries : 0;", "prefix_queries;"),
    ("last tile as long as the others", "left < kQueryRows ? left : kQueryRows;", "kQueryRows;"),
    (
        "prefix keys counted twice",
        "work.num_keys = keys.end - work.key_row;",
        "work.num_keys = keys.end - keys.begin;",
    ),
    (
        "heads and slots changed places",
        "work.head = index / launch.num_slots;",
        "work.head = index % static_cast<int>(p.num_heads);",
    ),
    (
        "work handed over before it is written",
        "    const uint32_t slot = slots + stage * kSlotBytes;\n    ptx::store",
        "    const uint32_t slot = slots + stage * kSlotBytes;\n    barriers.full(stage).arrive();\n    ptx::store",
    ),
    ("work read without waiting", "    barriers.full(at.stage).wait(at.parity);\n", ""),
    (
        "one slot for all work",
        "const uint32_t slot = slots + at.stage * kSlotBytes;",
        "const uint32_t slot = slots;",
    ),
    (
        "slot released by one lane before the others read",
        "    __syncwarp();\n    if (threadIdx.x % kWarpSize == 0) barriers",
        "    if (threadIdx.x % kWarpSize == 0) barriers",
    ),
]

IN_LAUNCH = [
    ("scale of the natural exponential", "p.softmax_scale * kLog2E", "p.softmax_scale"),
    ("last tile of equal windows dropped", "(rows + kQueryRows - 1) / kQueryRows", "rows / kQueryRows"),
    ("too few slots", "p.total_q / kQueryRows + p.num_segments);", "p.total_q / kQueryRows);"),
    (
        "values at the keys' stride",
        "p.v_stride_token, p.v_stride_head, kKeyRows",
        "p.k_stride_token, p.k_stride_head, kKeyRows",
    ),
    ("values are keys", "has_keys ? p.v : p.q", "has_keys ? p.k : p.q"),
    ("shared memory without room to align it", "kAlignment + kPrefix + (", "kPrefix + ("),
    ("no room for the prefix states", "(prefix ? kPrefixBytes : 0)", "0"),
    (
        "bfloat16 taken for float16",
        "params.dtype == DType::kBFloat16 ? launch",
        "params.dtype != DType::kBFloat16 ? launch",
    ),
]

IN_PRODUCER = [
    (
        "queries replaced while they are read",
        "      shared.query_barriers().empty(0).wait(query_at.parity ^ 1);\n",
        "",
    ),
    (
        "keys replaced while they are read",
        "        shared.key_barriers().empty(stage).wait(key_at.parity ^ 1);\n",
        "",
    ),
    (
        "values replaced while they are read",
        "        shared.value_barriers().empty(stage).wait(key_at.parity ^ 1);\n",
        "",
    ),
    (
        "work replaced while it is read",
        "      shared.work().barriers.empty(work_at.stage).wait(work_at.parity ^ 1);\n      shared.work().write(work_at.stage, work);",
        "      shared.work().write(work_at.stage, work);",
    ),
    (
        "fewer bytes announced",
        "query_full.arrive_expect(Shared::QueryTile::kBytes);",
        "query_full.arrive_expect(Shared::QueryTile::kBoxBytes);",
    ),
    (
        "keys of the query's head",
        "shared.keys(stage).copy(&launch.k, key_full, kv_head, token);",
        "shared.keys(stage).copy(&launch.k, key_full, work.head, token);",
    ),
    (
        "values of the first tile",
        "shared.values(stage).copy(&launch.v, value_full, kv_head, token);",
        "shared.values(stage).copy(&launch.v, value_full, kv_head, work.key_row);",
    ),
    ("position not advanced over empty work", "    query_at.advance();\n", ""),
    (
        "helpers not counted",
        "shared.key_barriers().init(kConsumerWarps + helpers);",
        "shared.key_barriers().init(kConsumerWarps);",
    ),
    (
        "a reader not counted",
        "shared.query_barriers().init(kConsumerWarps);",
        "shared.query_barriers().init(kConsumerWarps - 1);",
    ),
    ("no word that all is done", "none.head = kNegativeHead;", "none.head = 0;"),
    ("work of a neighbouring block", "index += gridDim.x", "index += gridDim.x + 1"),
]

IN_TILES = [
    ("ring that keeps its parity", "      parity ^= 1;\n", ""),
    ("no swizzle in a piece", "((piece % 8 ^ row % 8) << 4)", "((piece % 8) << 4)"),
    ("swizzle of four rows", "((piece % 8 ^ row % 8) << 4)", "((piece % 8 ^ row % 4) << 4)"),
    ("second box left out of a piece", "piece / 8 * kBoxBytes + row", "row"),
    ("second box left out of an operand", "step / kStepsPerBox * kBoxBytes + row", "row"),
    ("steps of 16 bytes", "constexpr int kStepBytes = 16 * 2,", "constexpr int kStepBytes = 16,"),
    ("eight rows in 512 bytes", "kNext8Rows = 8 * kRowBytes;", "kNext8Rows = 4 * kRowBytes;"),
    (
        "values' second box at the wrong place",
        "step * 16 * kRowBytes, kBoxBytes);",
        "step * 16 * kRowBytes, kBoxBytes / 2);",
    ),
    (
        "values eight rows at a time",
        "descriptor(address + step * 16 * kRowBytes,",
        "descriptor(address + step * 8 * kRowBytes,",
    ),
    (
        "operand without a swizzle",
        "constexpr uint64_t kSwizzle128 = 1ull << 62;",
        "constexpr uint64_t kSwizzle128 = 0;",
    ),
    ("only the first box copied", "box < kBoxes; ++box", "box < 1; ++box"),
    ("pairs the wrong way around", "__floats2bfloat162_rn(low, high)", "__floats2bfloat162_rn(high, low)"),
    ("-inf minus -inf", "(b == -INFINITY ? 0.0f : b)", "b"),
]

IN_CONSUMER = [
    ("queries read before they are there", "    shared.query_barriers().full(0).wait(query_parity);\n", ""),
    (
        "first keys read before they are there",
        "    float rescale[2];\n    shared.key_barriers().full(at.stage).wait(at.parity);\n",
        "    float rescale[2];\n",
    ),
    (
        "keys read before they are there",
        "      shared.key_barriers().full(at.stage).wait(at.parity);\n      shared.value",
        "      shared.value",
    ),
    (
        "values read before they are there",
        "      shared.value_barriers().full(before.stage).wait(before.parity);\n",
        "",
    ),
    (
        "last values read before they are there",
        "    shared.value_barriers().full(at.stage).wait(at.parity);\n",
        "",
    ),
    (
        "first keys released before they are multiplied",
        "    ptx::wgmma_wait<0>();\n    ptx::hold(scores);\n    release(shared.key_barriers().empty(at.stage));\n",
        "    release(shared.key_barriers().empty(at.stage));\n    ptx::wgmma_wait<0>();\n    ptx::hold(scores);\n",
    ),
    (
        "values released before they are multiplied",
        "      ptx::wgmma_wait<0>();\n      hold_all();\n      release(shared.value_barriers().empty(before.stage));\n",
        "      release(shared.value_barriers().empty(before.stage));\n      ptx::wgmma_wait<0>();\n      hold_all();\n",
    ),
    (
        "last values released before they are multiplied",
        "    ptx::wgmma_wait<0>();\n    ptx::hold(acc);\n    release(shared.value_barriers().empty(at.stage));\n",
        "    release(shared.value_barriers().empty(at.stage));\n    ptx::wgmma_wait<0>();\n    ptx::hold(acc);\n",
    ),
    (
        "queries released before the prefix keys meet them",
        "    add_prefix_keys(work);\n    const int tiles = work.key_tiles();\n    if (tiles == 0) {\n      __syncwarp();\n      release(shared.query_barriers().empty(0));\n",
        "    const int tiles = work.key_tiles();\n    if (tiles == 0) release(shared.query_barriers().empty(0));\n    add_prefix_keys(work);\n    if (tiles == 0) {\n",
    ),
    ("scores used before they are there", "ptx::wgmma_wait<1>();", "ptx::wgmma_wait<2>();"),
    (
        "sums used before they are there",
        "      ptx::wgmma_wait<0>();\n      hold_all();\n      release(",
        "      hold_all();\n      release(",
    ),
    (
        "no fence before the first product",
        "    hold_all();\n    ptx::wgmma_fence();\n    multiply_keys",
        "    hold_all();\n    multiply_keys",
    ),
    ("no fence before the products", "      ptx::wgmma_fence();\n      multiply_keys", "      multiply_keys"),
    (
        "products not committed",
        "shared.values(stage).by_row(step));\n    }\n    ptx::wgmma_commit();",
        "shared.values(stage).by_row(step));\n    }",
    ),
    (
        "scores added to those before",
        "shared.keys(stage).by_channel(0, step), step > 0);",
        "shared.keys(stage).by_channel(0, step), true);",
    ),
    ("both warpgroups at the same queries", "first_row(warpgroup * 64)", "first_row(0)"),
    (
        "fragment order",
        "weights[4 * step + 1], weights[4 * step + 2],",
        "weights[4 * step + 2], weights[4 * step + 1],",
    ),
    ("mask one off", "j % 2 >= count) scores", "j % 2 > count) scores"),
    (
        "mask of the wrong columns",
        "const int first = 2 * (threadIdx.x % 4);",
        "const int first = threadIdx.x % 4;",
    ),
    ("lone tile not masked", "if (tiles == 1 && last_count < kKeyRows) mask", "if (false) mask"),
    ("last tile not masked", "if (tile == tiles - 1 && last_count < kKeyRows) mask", "if (false) mask"),
    (
        "values of a neighbour not cleared",
        "if (last_count < kKeyRows) clear_values(",
        "if (false) clear_values(",
    ),
    ("a row too few cleared", "int i = count * kPieces + thread;", "int i = (count + 1) * kPieces + thread;"),
    ("cleared values not published", "    ptx::fence_async_proxy();\n", ""),
    (
        "values multiplied before they are cleared",
        "    ptx::named_barrier(kConsumerBarrier, kConsumerWarpgroups * kWarpgroup);\n",
        "",
    ),
    (
        "largest of half a row",
        "  return fmaxf(value, __shfl_xor_sync(kWholeWarp, value, 2));",
        "  return value;",
    ),
    (
        "largest score not kept",
        "    rows.largest[r] = largest;\n    const float shift",
        "    const float shift",
    ),
    ("sum not rescaled", "rows.sum[r] = fmaf(rows.sum[r], rescale[r], sum);", "rows.sum[r] += sum;"),
    ("accumulator not rescaled", "      multiply_rows(acc, rescale);\n", ""),
    (
        "prefix not rescaled",
        "    pack<T>(scores, weights);\n    multiply_rows(acc, rescale);\n",
        "    pack<T>(scores, weights);\n",
    ),
    ("rows rescaled crosswise", "factor[i / 2 % 2]", "factor[i % 2]"),
    (
        "prefix key one token off",
        "const int64_t token = work.key_row - work.prefix_keys + i;\n      const T* key",
        "const int64_t token = work.key_row - work.prefix_keys;\n      const T* key",
    ),
    (
        "prefix key of the query's head",
        "kv_head = work.head / (p.num_heads / p.num_kv_heads), quarter",
        "kv_head = work.head % p.num_kv_heads, quarter",
    ),
    ("prefix key counted four times", "quarter == 0 ? weight[r] : 0.0f", "weight[r]"),
    ("quarter of a prefix score", "        score += __shfl_xor_sync(kWholeWarp, score, 2);\n", ""),
    ("prefix values of other channels", "value + c * 8 + 2 * quarter", "value + c * 8"),
    ("sum of half a row", "      sum += __shfl_xor_sync(kWholeWarp, sum, 2);\n", ""),
    ("rows behind the tile stored", "if (row(r) >= work.num_queries) continue;", ""),
    (
        "not normalised",
        "const float factor = no_keys ? 0.0f : 1.0f / sum;",
        "const float factor = no_keys ? 0.0f : 1.0f;",
    ),
    (
        "a row without keys divided by 0",
        "const float factor = no_keys ? 0.0f : 1.0f / sum;",
        "const float factor = 1.0f / sum;",
    ),
    ("statistics of the tile before", "    rows = RowStatistics();\n", ""),
    ("lse in bits", "rows.largest[r] * kLn2 + logf(sum)", "rows.largest[r] + logf(sum)"),
    ("lse of the first head", "p.lse[work.head * p.total_q + token] = rows", "p.lse[token] = rows"),
]

IN_HELPER = [
    (
        "query of the tile for that of the prefix",
        "work.query_row - work.prefix_queries + query;\n    const T* from",
        "work.query_row + query;\n    const T* from",
    ),
    ("state not cleared", "ptx::store_shared_float(s.sum, 0.0f);", ";"),
    (
        "key of the wrong lane",
        "const uint4 k = key_piece(lane, piece);",
        "const uint4 k = key_piece(0, piece);",
    ),
    ("weights of one lane", "__shfl_sync(kWholeWarp, weight, row)", "__shfl_sync(kWholeWarp, weight, 0)"),
    ("rescale forgotten", "(channel + i) * 4) * rescale;", "(channel + i) * 4);"),
    (
        "prefix keys counted by each helper",
        "if (helper == 0 && work.prefix_keys > 0)",
        "if (work.prefix_keys > 0)",
    ),
    (
        "last keys of a tile dropped",
        "left - first < kWarpSize ? left - first : kWarpSize;",
        "left - first < kWarpSize ? 0 : kWarpSize;",
    ),
    ("groups that meet twice", "group += kHelperWarps) {", "group += kHelperWarps - 1) {"),
    ("keys not waited for", "        shared.key_barriers().full(key_at.stage).wait(key_at.parity);\n", ""),
    (
        "values not waited for",
        "        shared.value_barriers().full(key_at.stage).wait(key_at.parity);\n",
        "",
    ),
    (
        "rows written before all helpers are done",
        "        ptx::named_barrier(kHelperBarrier, kHelperWarps * kWarpSize);\n        store(work);",
        "        store(work);",
    ),
    (
        "states reused before they are read",
        "        store(work);\n        ptx::named_barrier(kHelperBarrier, kHelperWarps * kWarpSize);",
        "        store(work);",
    ),
    (
        "helpers added without rescale",
        "factor[h] = shifted_exp2(ptx::load_shared_float(state(h, query).largest), largest);",
        "factor[h] = 1.0f;",
    ),
    (
        "sums of one helper",
        "sum = fmaf(ptx::load_shared_float(state(h, query).sum), factor[h], sum);",
        "sum = ptx::load_shared_float(state(h, query).sum);",
    ),
    (
        "values of other channels",
        "values.piece(first + row, channel / 8) + channel % 8 * 2",
        "values.piece(first + row, channel / 8)",
    ),
]

MUTATIONS = IN_SCHEDULE + IN_LAUNCH + IN_PRODUCER + IN_TILES + IN_CONSUMER + IN_HELPER
