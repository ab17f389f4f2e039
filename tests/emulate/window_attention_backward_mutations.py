"""Bugs for csrc/window_attention_backward: (what is wrong, text of the source, text in its place)."""

IN_LAUNCH = [
    (
        "keys' map with rows of queries",
        "p.k_stride_token, p.k_stride_head, kBackwardKeys);",
        "p.k_stride_token, p.k_stride_head, kBackwardQueries);",
    ),
    (
        "values at the keys' stride",
        "p.v_stride_token, p.v_stride_head, kBackwardKeys);",
        "p.k_stride_token, p.k_stride_head, kBackwardKeys);",
    ),
    ("dout is q", "map(launch.dout, p.dout,", "map(launch.dout, p.q,"),
    ("scale of the natural exponential", "p.softmax_scale * kBackwardLog2E", "p.softmax_scale"),
    (
        "last tile of equal windows dropped",
        "(rows + kBackwardKeys - 1) / kBackwardKeys",
        "rows / kBackwardKeys",
    ),
    ("too few slots", "p.total_k / kBackwardKeys + p.num_segments);", "p.total_k / kBackwardKeys);"),
    (
        "a block less",
        "launch.num_slots * launch.params.num_kv_heads));",
        "launch.num_slots * launch.params.num_kv_heads - 1));",
    ),
    ("shared memory without room to align it", "kBytes = kAlignment + kEnd;", "kBytes = kEnd;"),
]

IN_SCHEDULE = [
    (
        "segments of the queries' lengths",
        "segment_of_slot(p.cu_seqlens_k, p.num_segments, kBackwardKeys, slot)",
        "segment_of_slot(p.cu_seqlens_q, p.num_segments, kBackwardKeys, slot)",
    ),
    (
        "keys that start at the prefix",
        "keys.begin + keys.prefix(p.num_prefix_tokens) + tile",
        "keys.begin + tile",
    ),
    ("last tile as long as the others", "left < kBackwardKeys ? left : kBackwardKeys;", "kBackwardKeys;"),
    (
        "queries of the keys' lengths",
        "const Segment queries(p.cu_seqlens_q,",
        "const Segment queries(p.cu_seqlens_k,",
    ),
    (
        "prefix queries left out",
        "work.query_row = queries.begin;",
        "work.query_row = queries.begin + queries.prefix(p.num_prefix_tokens);",
    ),
    (
        "last step dropped",
        "(num_queries + kBackwardQueries - 1) / kBackwardQueries",
        "num_queries / kBackwardQueries",
    ),
    ("key head of the query's", "work.kv_head = blockIdx.x / launch.num_slots;", "work.kv_head = 0;"),
    ("end of a segment beyond the tensor", "after < begin ? begin : after > last ? last : after;", "after;"),
    (
        "slots without the segment",
        "__ldg(cu_seqlens + segment) / rows + segment;",
        "__ldg(cu_seqlens + segment) / rows;",
    ),
]

IN_PRODUCER = [
    (
        "queries replaced while they are read",
        "      shared.query_barriers().empty(at.stage).wait(at.parity ^ 1);\n",
        "",
    ),
    (
        "fewer bytes announced",
        "full.arrive_expect(2 * Shared::QueryTile::kBytes);",
        "full.arrive_expect(Shared::QueryTile::kBytes);",
    ),
    (
        "keys announced without values",
        "arrive_expect(2 * Shared::KeyTile::kBytes);",
        "arrive_expect(Shared::KeyTile::kBytes);",
    ),
    (
        "dout of the first queries",
        "shared.dout(stage).copy(&launch.dout, full, head, work.query_row + query);",
        "shared.dout(stage).copy(&launch.dout, full, head, work.query_row);",
    ),
    (
        "queries of the first head",
        "shared.queries(stage).copy(&launch.q, full, head,",
        "shared.queries(stage).copy(&launch.q, full, work.kv_head,",
    ),
    (
        "statistics that nobody waits for",
        "shared.query_barriers().init(kBackwardConsumers / kWarpSize, 2);",
        "shared.query_barriers().init(kBackwardConsumers / kWarpSize, 1);",
    ),
    (
        "half of the readers",
        "shared.query_barriers().init(kBackwardConsumers / kWarpSize, 2);",
        "shared.query_barriers().init(kBackwardConsumers / kWarpSize / 2, 2);",
    ),
    (
        "half of the statistics",
        "i < kBackwardQueries; i += kWarpSize",
        "i < kBackwardQueries / 2; i += kWarpSize",
    ),
    ("lse in nats", "__ldg(p.lse + from) * kBackwardLog2E", "__ldg(p.lse + from)"),
    (
        "queries that do not exist weigh",
        "__ldg(p.lse + from) * kBackwardLog2E : INFINITY",
        "__ldg(p.lse + from) * kBackwardLog2E : -1000.0f",
    ),
    (
        "statistics of the first head",
        "head * p.total_q + work.query_row + query + i;",
        "work.query_row + query + i;",
    ),
    (
        "statistics released by one lane before the others wrote",
        "    __syncwarp();\n    if (threadIdx.x % kWarpSize == 0) shared.query_barriers().full(stage).arrive();",
        "    if (threadIdx.x % kWarpSize == 0) shared.query_barriers().full(stage).arrive();",
    ),
]

IN_CONSUMER = [
    ("keys read before they are there", "    shared.key_barrier().wait(0);\n", ""),
    (
        "queries read before they are there",
        "        shared.query_barriers().full(at.stage).wait(at.parity);\n",
        "",
    ),
    (
        "both warpgroups at the same keys of the scores",
        "shared.keys().by_channel(warpgroup * 64, step)",
        "shared.keys().by_channel(0, step)",
    ),
    (
        "both warpgroups at the same values",
        "shared.values().by_channel(warpgroup * 64, step)",
        "shared.values().by_channel(0, step)",
    ),
    (
        "gradients of the queries, not of dout",
        "shared.dout(stage).by_channel(0, step)",
        "shared.queries(stage).by_channel(0, step)",
    ),
    ("scores used before they are there", "    ptx::wgmma_wait<1>();\n", ""),
    (
        "gradients used before they are there",
        "    ptx::wgmma_wait<0>();\n    ptx::hold(gradients);\n",
        "    ptx::hold(gradients);\n",
    ),
    (
        "no fence before the first products",
        "    ptx::wgmma_fence();\n    multiply_queries",
        "    multiply_queries",
    ),
    ("no fence before the sums", "    ptx::wgmma_fence();\n    add_rows(dv", "    add_rows(dv"),
    ("no fence before dq", "      ptx::wgmma_fence();\n      multiply_gradients", "      multiply_gradients"),
    ("delta forgotten", "(gradients[at] - delta)", "gradients[at]"),
    ("delta is lse", "shared.delta(stage) + query * 4", "shared.lse(stage) + query * 4"),
    (
        "statistics of neighbouring queries",
        "lse = ptx::load_shared_float(shared.lse(stage) + query * 4);",
        "lse = ptx::load_shared_float(shared.lse(stage) + (query ^ 1) * 4);",
    ),
    (
        "gradients of keys that do not exist",
        "gradients[at] = row(r) < work.num_keys ? scores[at] * (gradients[at] - delta) : 0.0f;",
        "gradients[at] = exp2f(-scores[at]) - delta;",
    ),
    (
        "dv of dk's rows",
        "add_rows(dv, packed_weights, shared.dout(stage));",
        "add_rows(dv, packed_weights, shared.queries(stage));",
    ),
    (
        "dk of the weights",
        "add_rows(dk, packed_gradients, shared.queries(stage));",
        "add_rows(dk, packed_weights, shared.queries(stage));",
    ),
    (
        "fragment order",
        "packed[4 * step + 1], packed[4 * step + 2],",
        "packed[4 * step + 2], packed[4 * step + 1],",
    ),
    (
        "queries released before they are multiplied",
        "    ptx::wgmma_wait<0>();\n    ptx::hold(dk);\n    ptx::hold(dv);\n    if (threadIdx.x % kWarpSize == 0) shared.query_barriers().empty(stage).arrive();\n",
        "    if (threadIdx.x % kWarpSize == 0) shared.query_barriers().empty(stage).arrive();\n    ptx::wgmma_wait<0>();\n    ptx::hold(dk);\n    ptx::hold(dv);\n",
    ),
    (
        "gradients shared without a proxy fence",
        "    ptx::fence_async_proxy();\n    meet_consumers();\n  }\n\n  // dq",
        "    meet_consumers();\n  }\n\n  // dq",
    ),
    (
        "gradients multiplied before all are shared",
        "    ptx::fence_async_proxy();\n    meet_consumers();\n  }\n\n  // dq",
        "    ptx::fence_async_proxy();\n  }\n\n  // dq",
    ),
    ("one buffer for all gradients", "kGradients + buffer * GradientTile::kBytes", "kGradients"),
    (
        "gradients of the wrong rows",
        "piece(row(r), i) + threadIdx.x % 4 * 4",
        "piece(row(1 - r), i) + threadIdx.x % 4 * 4",
    ),
    (
        "gradients of the first query twice",
        "static_cast<int>(packed_gradients[2 * i + r])",
        "static_cast<int>(packed_gradients[i + r])",
    ),
    (
        "dq by one warpgroup alone",
        "const bool my_turn = buffer == warpgroup;",
        "const bool my_turn = warpgroup == 0 && buffer == 0;",
    ),
    ("dq twice", "const bool my_turn = buffer == warpgroup;", "const bool my_turn = true;"),
    (
        "dq of half of the keys",
        "step < kBackwardKeys / 16; ++step)\n      ptx::wgmma_both",
        "step < kBackwardKeys / 32; ++step)\n      ptx::wgmma_both",
    ),
    (
        "dq added to that of the step before",
        "shared.keys().by_row(step), step > 0);",
        "shared.keys().by_row(step), true);",
    ),
    (
        "dq of the values",
        "shared.keys().by_row(step), step > 0);",
        "shared.values().by_row(step), step > 0);",
    ),
    (
        "dq used before it is there",
        "      ptx::wgmma_wait<0>();\n      ptx::hold(dq);\n      add_dq",
        "      ptx::hold(dq);\n      add_dq",
    ),
    ("dq of the second warpgroup's rows", "first_query + row(r) - warpgroup * 64;", "first_query + row(r);"),
    ("dq behind the segment", "      if (query >= work.num_queries) continue;\n", ""),
    (
        "dq of the first head",
        "(token * p.num_heads + head) * HEAD_DIM + threadIdx.x",
        "token * p.num_heads * HEAD_DIM + threadIdx.x",
    ),
    (
        "tail of the queries not cleared",
        "      clear_rows(shared.queries(stage), count, kBackwardQueries);\n",
        "",
    ),
    ("tail of dout not cleared", "      clear_rows(shared.dout(stage), count, kBackwardQueries);\n", ""),
    (
        "cleared queries not published",
        "kBackwardQueries);\n      ptx::fence_async_proxy();\n",
        "kBackwardQueries);\n",
    ),
    (
        "queries multiplied before they are cleared",
        "kBackwardQueries);\n      ptx::fence_async_proxy();\n      meet_consumers();\n",
        "kBackwardQueries);\n      ptx::fence_async_proxy();\n",
    ),
    ("tail of the keys not cleared", "      clear_rows(shared.keys(), work.num_keys, kBackwardKeys);\n", ""),
    ("cleared keys not published", "kBackwardKeys);\n      ptx::fence_async_proxy();\n", "kBackwardKeys);\n"),
    ("dk not scaled", "p.dk_stride_head, p.softmax_scale);", "p.dk_stride_head, 1.0f);"),
    ("dv scaled", "p.dv_stride_head, 1.0f);", "p.dv_stride_head, p.softmax_scale);"),
    (
        "dv at dk's stride",
        "store(p.dv, dv, p.dv_stride_token, p.dv_stride_head,",
        "store(p.dv, dv, p.dk_stride_token + 8, p.dv_stride_head,",
    ),
    ("rows behind the tile stored", "      if (row(r) >= work.num_keys) continue;\n", ""),
    ("sums not started at zero", "dk[i] = dv[i] = dq[i] = 0.0f;", "dv[i] = dq[i] = 0.0f;"),
    (
        "one head of the group",
        "for (int i = 0; i < group; ++i) {\n      for (int tile = 0; tile < work.query_tiles(); ++tile) {\n        shared.query_barriers().full",
        "for (int i = 0; i < 1; ++i) {\n      for (int tile = 0; tile < work.query_tiles(); ++tile) {\n        shared.query_barriers().full",
    ),
    (
        "heads of another group",
        "add_queries(work.kv_head * group + i, tile,",
        "add_queries(work.kv_head + i, tile,",
    ),
]

MUTATIONS = IN_LAUNCH + IN_SCHEDULE + IN_PRODUCER + IN_CONSUMER
