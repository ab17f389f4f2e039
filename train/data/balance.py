"""Who reads what in a step: samples dealt to forwards so that each has about as much to compute."""

import heapq
import zlib
from array import array
from collections.abc import Sequence


def deal(costs: Sequence[int], num_shares: int) -> list[list[int]]:
    """Places 0..len(costs) - 1 in `num_shares` equal shares whose sums of costs are near each other.

    The most expensive first, each to the share with the smallest sum that still has room (Graham's longest
    processing time, with shares of fixed length); ties go to the earlier place and the earlier share.
    Consecutive shares stay where that is no better, as with equal costs. Each share is in ascending order."""
    size = len(costs) // num_shares
    consecutive = [list(range(start, start + size)) for start in range(0, len(costs), size)]
    if len(set(costs)) <= 1:
        return consecutive
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    open_shares = [(0, share) for share in range(num_shares)]
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        total, share = heapq.heappop(open_shares)
        shares[share].append(place)
        if len(shares[share]) < size:
            heapq.heappush(open_shares, (total + costs[place], share))
    shares = [sorted(share) for share in shares]
    return min(consecutive, shares, key=lambda deal: imbalance(costs, deal))


def imbalance(costs: Sequence[int], shares: Sequence[Sequence[int]]) -> float:
    """The largest sum of costs of a share over the mean one; 1 where nothing costs anything."""
    sums = [sum(costs[place] for place in share) for share in shares]
    return max(sums) * len(sums) / sum(sums) if any(sums) else 1.0


def checksum(shares: Sequence[Sequence[int]]) -> int:
    """CRC-32 of what is read where; sample indices may have any number of bits."""
    numbers = array("Q")
    for share in shares:
        for index in share:
            numbers.extend((index & (1 << 64) - 1, index >> 64))
    return zlib.crc32(numbers.tobytes())
