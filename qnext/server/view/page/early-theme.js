// Before the first paint: the theme that was chosen here, else the system's.
{
  const chosen = localStorage.getItem("qnext-theme");
  const isDark = chosen ? chosen === "dark" : !matchMedia("(prefers-color-scheme: light)").matches;
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
}
