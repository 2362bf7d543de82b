(() => {
  const element = (id) => document.getElementById(id);
  const form = element("form");
  const zone = element("zone");
  let file = null;
  let running = null;
  let jsonAddress = null;

  const choose = (chosen) => {
    file = chosen ?? null;
    const preview = element("preview");
    if (preview.src) URL.revokeObjectURL(preview.src);
    preview.removeAttribute("src");
    element("chosen").hidden = !file;
    if (!file) {
      element("image").value = "";
      return;
    }
    preview.src = URL.createObjectURL(file);
    element("name").textContent = file.name;
  };

  const fail = (text) => {
    element("problem").textContent = text;
    element("problem").hidden = !text;
  };

  const show = (data) => {
    // The server's own markup, in which every text is escaped; the page's policy runs no script in it.
    element("card").innerHTML = data.card;
    delete data.card;
    const text = JSON.stringify(data, null, 2);
    element("json").textContent = text;
    if (jsonAddress) URL.revokeObjectURL(jsonAddress);
    jsonAddress = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    element("download").href = jsonAddress;
    element("answer").hidden = false;
    element("status").textContent = `Answered in ${Math.round(data.timing.total)} ms.`;
    element("answer").focus({ preventScroll: true });
    element("answer").scrollIntoView({ block: "nearest" });
  };

  const body = () => {
    const data = new FormData();
    if (file) data.append("image", file);
    const caption = element("caption").value;
    if (caption) data.append("caption", caption);
    const box = element("box")?.value;
    if (box) data.append("box", box);
    return data;
  };

  const send = async () => {
    running?.abort();
    const mine = (running = new AbortController());
    const token = element("token")?.value;
    const headers = token ? { Authorization: `Bearer ${token}` } : {};
    fail("");
    element("answer").hidden = true;
    element("status").textContent = "Waiting for the answer …";
    element("send").disabled = true;
    try {
      const response = await fetch("v1/predict?card=true&heatmap=true", {
        method: "POST",
        body: body(),
        headers,
        signal: mine.signal,
      });
      const data = await response.json().catch(() => null);
      if (!data) throw new Error(`The service answered ${response.status}, not with JSON.`);
      if (!response.ok) throw new Error(`${data.message} (${data.code})`);
      show(data);
    } catch (error) {
      if (mine.signal.aborted) return;
      element("status").textContent = "";
      fail(error instanceof TypeError ? "The service did not answer." : error.message);
    } finally {
      if (running === mine) element("send").disabled = false;
    }
  };

  element("image").addEventListener("change", (event) => choose(event.target.files[0]));
  element("remove").addEventListener("click", () => {
    choose(null);
    element("image").focus();
  });
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      zone.classList.toggle("over", kind === "dragover");
      if (kind === "drop" && event.dataTransfer.files.length) choose(event.dataTransfer.files[0]);
    });
  }
  document.addEventListener("paste", (event) => {
    const pasted = Array.from(event.clipboardData.files).find((each) => each.type.startsWith("image/"));
    if (pasted) choose(pasted);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (file || element("caption").value) send();
    else fail("Choose an image, or write a caption.");
  });
})();
