(() => {
  const list = document.getElementById("pairs");
  const form = document.getElementById("controls");
  const value = (id) => document.getElementById(id).value;
  const pairs = Array.from(list.children, (element, order) => ({
    element,
    order,
    score: element.dataset.score === "" ? NaN : Number(element.dataset.score),
    text: (element.dataset.name + " " + (element.querySelector(".caption")?.textContent ?? "")).toLowerCase(),
    types: element.dataset.types.split(" "),
  }));
  // Pairs without a score come last either way.
  const byScore = (sign) => (a, b) => {
    if (isNaN(a.score) || isNaN(b.score)) return isNaN(a.score) - isNaN(b.score);
    return sign * (a.score - b.score);
  };
  const orders = {
    order: () => 0,
    highest: byScore(-1),
    lowest: byScore(1),
    name: (a, b) => a.element.dataset.name.localeCompare(b.element.dataset.name, undefined, { numeric: true }),
  };
  const sort = () => {
    const compare = orders[value("sort")];
    pairs.sort((a, b) => compare(a, b) || a.order - b.order);
    list.append(...pairs.map((pair) => pair.element));
  };
  const filter = () => {
    const [verdict, type, text] = [value("verdict"), value("type"), value("text").trim().toLowerCase()];
    let shown = 0;
    for (const pair of pairs) {
      const fits =
        (!verdict || pair.element.dataset.verdict === verdict) &&
        (!type || pair.types.includes(type)) &&
        pair.text.includes(text);
      pair.element.hidden = !fits;
      shown += fits;
    }
    document.getElementById("shown").value = shown === pairs.length ? "" : `${shown} of ${pairs.length} shown`;
  };
  document.getElementById("sort").addEventListener("input", sort);
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  // A browser may have kept the choices of an earlier visit.
  sort();
  filter();
})();
